"""autonomous.json, and which database an app uses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from anton import config
from anton.errors import ConfigError


def write(folder: Path, **values: Any) -> config.Config:
    (folder / config.FILE).write_text(json.dumps(values))
    return config.load(folder)


def test_without_a_file_the_folder_names_the_app_and_the_database_is_embedded(tmp_path: Path) -> None:
    folder = tmp_path / "My Bot 9"
    folder.mkdir()
    found = config.load(folder)
    assert (found.name, found.settings.app, found.storage.url) == ("my-bot-9", "main", "embedded")


def test_the_flag_wins_over_the_environment_over_the_file(tmp_path: Path) -> None:
    found = write(tmp_path, storages=[{"name": "db", "type": "database", "url": "postgresql://file/x"}])
    environ = {"DATABASE_URL": "postgresql://url/x", "PGHOST": "pg", "PGDATABASE": "x"}

    def url(database: str | None, **environ: str) -> str:
        return config.find_target(found, database, environ).url

    assert url("postgresql://flag/x", **environ) == "postgresql://flag/x"
    assert url(None, **environ) == "postgresql://url/x"
    assert url(None, PGHOST="pg", PGDATABASE="x", PGUSER="me", PGPORT="6") == "postgresql://me@/x?host=pg&port=6"
    assert url(None, PGSERVICE="prod") == "postgresql://?service=prod"
    assert url(None) == "postgresql://file/x"


def test_the_target_says_where_its_url_came_from(tmp_path: Path) -> None:
    found = write(tmp_path, storages=[{"name": "pool", "type": "database", "url": "env:MAIN_DB", "pooled": True}])
    target = config.find_target(found, None, {"MAIN_DB": "postgresql://ann:s3cret@db.example/shop"})
    assert (target.pooled, target.source) == (True, 'storage "pool" of autonomous.json')
    assert "s3cret" not in repr(target)
    assert "ann:***@db.example" in repr(target)


def test_an_unset_variable_is_an_error_that_names_it(tmp_path: Path) -> None:
    found = write(tmp_path, storages=[{"name": "db", "type": "database", "url": "env:MAIN_DB"}])
    with pytest.raises(ConfigError, match='storage "db" of autonomous.json says env:MAIN_DB.*not set'):
        config.find_target(found, None, {})


def test_env_values_are_read_where_they_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PORT", "8080")
    assert write(tmp_path, deployment={"port": "env:PORT"}).settings.deployment.port == 8080
    monkeypatch.delenv("PORT")
    with pytest.raises(ConfigError, match='"port" of autonomous.json says env:PORT'):
        write(tmp_path, deployment={"port": "env:PORT"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"storage": []}, 'unknown key "storage". Did you mean "storages"?'),
        ({"storages": [{"name": "a", "type": "database", "ulr": "x"}]}, '"storages[0].ulr". Did you mean "url"?'),
        ({"deployment": {"prot": 1}}, 'unknown key "deployment.prot". Did you mean "port"?'),
        ({"deployment": {"port": 99999}}, '"deployment.port" is 99999: input should be less than or equal to 65535'),
        ({"storages": [{"type": "database"}]}, '"storages[0].name" is missing'),
        ({"storages": [{"name": "a", "type": "bucket"}]}, '"storages[0].type" is "bucket". Allowed: "database"'),
        ({"storages": [{"name": "a"}]}, '"storages[0].type" is missing. Allowed: "database", "files"'),
        ({"storages": [{"name": "a", "type": "files"}]}, '"storages[0].url" is missing'),
        ({"storages": [{"name": "a", "type": "files", "url": "s3://b", "ulr": "x"}]},
         '"storages[0].ulr". Did you mean "url"? Allowed: name, type, url, options'),
        ({"storages": [{"name": "a", "type": "files", "url": "s3://b", "options": {"regoin": "x"}}]},
         'no option "regoin". Did you mean "region"?'),
        ({"storages": [{"name": "a", "type": "files", "url": "s3://b", "options": {"secret_access_key": "hush"}}]},
         '"secret_access_key" is secret: write "env:NAME"'),
        ({"name": "My Bot"}, '"name" is "My Bot"'),
    ],
)
def test_a_wrong_value_names_key_and_what_is_allowed(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        write(tmp_path, **values)
    assert message in str(raised.value)


@pytest.mark.parametrize("text", ["{", "[]", '"x"'])
def test_what_is_no_json_object_is_an_error_that_names_the_file(tmp_path: Path, text: str) -> None:
    (tmp_path / config.FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"autonomous\.json (is not JSON|must be an object)"):
        config.load(tmp_path)


def test_a_url_of_another_scheme_is_refused_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        config.find_target(config.load(tmp_path), "mysql://ann:s3cret@host/x", {})
    assert "'mysql://ann:***@host/x' from --database is not a database URL" in str(raised.value)


@pytest.mark.parametrize(
    ("url", "loopback"),
    [
        ("postgresql://localhost/x", True),
        ("postgresql://me@127.0.0.1:5432/x", True),
        ("postgresql://[::1]:5432/x", True),
        ("postgresql://me@/x?host=/tmp/socket", True),
        ("postgresql:///x", True),
        ("postgresql://db.example/x", False),
        ("postgresql://me@/x?host=db.example", False),
        ("postgresql://127.0.0.1,10.0.0.9/x", False),
        ("postgresql://?service=prod", False),
    ],
)
def test_loopback_is_this_machine(url: str, loopback: bool) -> None:
    assert config.Target(url, "the test").loopback is loopback


def test_the_shipped_schema_is_that_of_the_settings() -> None:
    shipped = Path(config.__file__).with_name("autonomous.schema.json")
    assert json.loads(shipped.read_text()) == config.json_schema()


@pytest.mark.parametrize("entry, said", [
    ({"name": "a", "service": "openai", "api_key": "sk-plain-as-day"}, 'it is secret. Allowed: "env:NAME"'),
    ({"name": "a", "service": "openai"}, "one of api_key, oauth_token, secret is to be given"),
    ({"name": "a", "service": "openai", "api_key": "env:A", "oauth_token": "env:B"}, "api_key and oauth_token"),
    ({"name": "a", "service": "openai", "apikey": "sk-plain-as-day"}, 'Did you mean "api_key"')])
def test_a_connection_is_a_reference_and_what_is_wrong_with_it_shows_no_secret(entry, said, tmp_path: Path) -> None:
    (tmp_path / config.FILE).write_text(json.dumps({"connections": [entry]}))
    with pytest.raises(ConfigError) as caught:
        config.load(tmp_path)
    assert said in str(caught.value) and "plain-as-day" not in str(caught.value)


def test_a_connection_whose_variable_is_not_set_is_no_error_until_it_is_used(tmp_path: Path) -> None:
    entry = {"name": "a", "service": "openai", "api_key": "env:NOT_SET", "base_url": "env:NOT_SET_EITHER"}
    (tmp_path / config.FILE).write_text(json.dumps({"connections": [entry]}))
    (one,) = config.load(tmp_path).settings.connections
    assert (one.variable, one.base_url) == ("NOT_SET", "env:NOT_SET_EITHER")
