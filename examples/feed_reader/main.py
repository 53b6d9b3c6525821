"""Posts what is new in two feeds to Slack.

    feeds, every 15 minutes --> articles --> a message each, for those about releases

Try it: anton dev. For real: pip install 'anton-framework[rss]', set SLACK_TOKEN, then anton work.
"""

from datetime import datetime

from anton_components.vendor.rss.poll import Rss
from anton_components.vendor.slack.action import SlackPostMessage
from pydantic import BaseModel

from anton import Table, env, poll


class Article(BaseModel):
    guid: str
    title: str
    link: str
    published: datetime | None
    feed: str


articles = Table("articles", Article, key="guid")

poll(Rss(articles, "https://www.postgresql.org/news.rss"), every="15m")
poll(Rss(articles, "https://blog.python.org/rss.xml"), every="15m")

articles.on_new_records(
    SlackPostMessage(oauth_token=env("SLACK_TOKEN"), message_template="{title} {link}", channel="#releases"),
    where="title ilike '%released%'")
