"""Copy a bucket to a folder or back; what is there already in the same size and no older is not copied again.

    python infra/objects.py download|upload BUCKET FOLDER

The endpoint comes from MLFLOW_S3_ENDPOINT_URL, keys and region from AWS_*, as for MLflow's server.
"""

import os
import sys
from pathlib import Path
from typing import Any

import boto3


def main(verb: str, bucket: str, folder: Path) -> None:
    """Copy, and say how much."""
    client = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"))
    there = {item["Key"]: item for item in listed(client, bucket)}
    copied = download(client, bucket, folder, there) if verb == "download" else upload(client, bucket, folder, there)
    print(f"{verb}: {copied} objects copied")  # noqa: T201


def listed(client: Any, bucket: str) -> list[dict[str, Any]]:
    """Every object of the bucket."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
    return [item for page in pages for item in page.get("Contents", [])]


def download(client: Any, bucket: str, folder: Path, there: dict[str, dict[str, Any]]) -> int:
    """Objects to files, each whole or not at all."""
    copied = 0
    for key, item in there.items():
        path = folder / key
        if not path.resolve().is_relative_to(folder.resolve()):
            sys.exit(f"error: the key {key} leads out of the folder")
        changed_s = item["LastModified"].timestamp()
        if path.is_file() and path.stat().st_size == item["Size"] and path.stat().st_mtime >= changed_s:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        client.download_file(bucket, key, str(partial))
        partial.rename(path)
        copied += 1
    return copied


def upload(client: Any, bucket: str, folder: Path, there: dict[str, dict[str, Any]]) -> int:
    """Files to objects."""
    copied = 0
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".part"):
        key = path.relative_to(folder).as_posix()
        if key not in there or there[key]["Size"] != path.stat().st_size:
            client.upload_file(str(path), bucket, key)
            copied += 1
    return copied


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] not in ("download", "upload"):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
