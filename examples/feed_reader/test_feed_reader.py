"""The reader, from an article to the captured message. In tests no feed is asked."""

ARTICLE = {"guid": "1", "link": "https://example.com/1", "published": None, "feed": "https://example.com/feed.xml"}


def test_a_release_is_posted_and_other_news_are_not(app):
    app.tables["articles"].extend([{**ARTICLE, "title": "PostgreSQL 19 Released!"},
                                   {**ARTICLE, "guid": "2", "title": "A conference"}])
    app.run()
    assert [(call.channel, call.text) for call in app.outbox] == [
        ("#releases", "PostgreSQL 19 Released! https://example.com/1")]
    assert not app.dead


def test_both_feeds_are_polled_and_here_nobody_is_asked(app):
    app.run()
    assert set(app.app.schedules) == {"rss www.postgresql.org/news.rss", "rss blog.python.org/rss.xml"}
    assert app.records("articles") == [] and not app.dead
