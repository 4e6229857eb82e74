"""Buckets, on a real S3-compatible server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from qlora_core.errors import SourceError, SourceUnavailableError
from qlora_core.events import ignore
from qlora_core.hub.resolve import fetch_data, resolve
from qlora_core.recipe import S3Source
from tests.integration.conftest import free_port
from tests.team import wait_for
from tests.team_servers import BUCKET, bucket, object_store

SECRET = "a secret"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with object_store(tmp_path_factory.mktemp("s3"), SECRET) as url:
        wait_for("the bucket", lambda: bucket(url, SECRET))
        yield url


@pytest.fixture(autouse=True)
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A client; the bucket is empty before and after."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "mlflow")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    client = boto3.Session().client("s3")
    yield client
    for item in client.list_objects_v2(Bucket=BUCKET).get("Contents", []):
        client.delete_object(Bucket=BUCKET, Key=item["Key"])


def source(path: str = "rows", **more: str) -> S3Source:
    return S3Source(source="s3", url=f"s3://{BUCKET}/{path}", **more)


def revision(path: str = "rows") -> str:
    return resolve(source(path), "data", Path("unused")).revision


def fetched(found: S3Source, tmp_path: Path, resolved=None) -> dict[str, bytes]:
    resolved = resolved or resolve(found, "data", tmp_path / "downloads")
    snapshot = fetch_data([resolved], [], tmp_path / "downloads", tmp_path / "into", ignore)
    return {file.name: (snapshot.path / file.name).read_bytes() for file in snapshot.rows}


def test_a_folder_gives_its_data_files_and_no_neighbour(s3, tmp_path: Path):
    for key in ("rows/a.json", "rows/more/b.jsonl", "rows/README.md", "rows-of-others/c.json"):
        s3.put_object(Bucket=BUCKET, Key=key, Body=key.encode())
    assert fetched(source(), tmp_path) == {
        "rows/a.json": b"rows/a.json",
        "rows/more/b.jsonl": b"rows/more/b.jsonl",
    }


def test_one_object_is_taken_by_its_key(s3, tmp_path: Path):
    s3.put_object(Bucket=BUCKET, Key="rows/a.json", Body=b"[1]")
    assert fetched(source("rows/a.json"), tmp_path) == {"rows/a.json": b"[1]"}


def test_the_revision_follows_names_and_content_alone(s3):
    s3.put_object(Bucket=BUCKET, Key="rows/a.json", Body=b"[1]")
    first = revision()
    s3.put_object(Bucket=BUCKET, Key="rows/a.json", Body=b"[1]")
    s3.put_object(Bucket=BUCKET, Key="rows/README.md", Body=b"about")
    assert revision() == first
    s3.put_object(Bucket=BUCKET, Key="rows/b.json", Body=b"[2]")
    both = revision()
    s3.put_object(Bucket=BUCKET, Key="rows/b.json", Body=b"[3]")
    assert len({first, both, revision()}) == 3


def test_what_is_here_is_not_fetched_again(s3, tmp_path: Path):
    s3.put_object(Bucket=BUCKET, Key="rows/a.json", Body=b"[1]")
    fetched(source(), tmp_path)
    (kept,) = (tmp_path / "downloads" / "s3").rglob("a.json")
    before = kept.stat().st_mtime_ns
    assert fetched(source(), tmp_path) == {"rows/a.json": b"[1]"}
    assert kept.stat().st_mtime_ns == before


def test_a_change_after_the_pin_is_refused(s3, tmp_path: Path):
    s3.put_object(Bucket=BUCKET, Key="rows/a.json", Body=b"[1]")
    pinned = resolve(source(), "data", tmp_path)
    s3.put_object(Bucket=BUCKET, Key="rows/a.json", Body=b"[2]")
    with pytest.raises(SourceError, match="changed while it was being used"):
        fetched(source(), tmp_path, pinned)
    with pytest.raises(SourceError, match="as `revision` pins"):
        resolve(source(revision=pinned.revision), "data", tmp_path)


@pytest.mark.parametrize(
    ("variable", "value", "kind", "said"),
    [
        ("AWS_SECRET_ACCESS_KEY", "wrong", SourceError, "may not be read with the key"),
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:{closed}", SourceUnavailableError, "look at AWS_ENDPOINT_URL"),
        ("HF_HUB_OFFLINE", "1", SourceUnavailableError, "HF_HUB_OFFLINE forbids asking"),
    ],
)
def test_a_store_that_does_not_answer_says_what_to_look_at(s3, monkeypatch, variable, value, kind, said):
    monkeypatch.setenv(variable, value.format(closed=free_port()))
    with pytest.raises(kind, match=said) as caught:
        revision()
    assert type(caught.value) is kind


@pytest.mark.parametrize(
    ("url", "said"), [(f"s3://{BUCKET}/nothing", "holds nothing"), ("s3://no-such-bucket/rows", "NoSuchBucket")]
)
def test_what_is_not_there_is_named(s3, url, said):
    with pytest.raises(SourceError, match=said):
        resolve(S3Source(source="s3", url=url), "data", Path("unused"))
