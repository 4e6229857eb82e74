"""Fetch one file over HTTP: resumed after a cut, retried while the server is busy, verified before it is used."""

import time
from pathlib import Path

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from qlora_core.errors import SourceError, SourceUnavailableError
from qlora_core.events import Note, Progress, Report
from qlora_core.hub.disk import require_space
from qlora_core.store import sha256_of_file

TIMEOUT_S = (10.0, 60.0)
"""To connect, and between two pieces of an answer."""
ATTEMPTS = 5
BUSY = (429, 500, 502, 503, 504)
CHUNK_BYTES = 2**16
"""What is lost at most when the connection is cut."""
REPORT_EVERY_S = 0.5


def patient_session() -> requests.Session:
    """An HTTP session that asks again, ever more slowly, while a server says that it is busy."""
    session = requests.Session()
    session.headers["User-Agent"] = f"qlora-flows {requests.utils.default_user_agent()}"
    retry = Retry(total=ATTEMPTS, backoff_factor=0.5, status_forcelist=BUSY, allowed_methods=("GET", "HEAD"), connect=1)
    for scheme in ("https://", "http://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry))
    return session


def download(session: requests.Session, url: str, target: Path, sha256: str, report: Report) -> Path:
    """Fetch `url` to `target`, going on from `target.part` if an earlier attempt left one.

    Raises:
        SourceUnavailableError: the server could not be reached or broke off too often.
        SourceError: the bytes are not those of `sha256`; nothing is kept.
    """
    part = target.with_name(f"{target.name}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _append(session, url, part, report)
            break
        except requests.RequestException as error:
            if attempt == ATTEMPTS or _is_refusal(error):
                raise SourceUnavailableError(
                    f"{target.name} could not be downloaded: {error}. What came so far is kept; run again to go on"
                ) from error
            report(Note(message=f"the download of {target.name} broke off, going on from byte {part.stat().st_size:,}"))
            time.sleep(0.5 * 2**attempt)
    received = sha256_of_file(part)
    if received != sha256:
        part.unlink()
        raise SourceError(
            f"{target.name} has SHA-256 {received}, not {sha256} as pinned; it was thrown away. "
            "Run again; if it stays so, somebody has changed the file, and the pin should not be changed blindly"
        )
    part.replace(target)
    return target


def _append(session: requests.Session, url: str, part: Path, report: Report) -> None:
    """Fetch what `part` does not have yet; a server that cannot continue starts again from the first byte."""
    part.touch()
    have = part.stat().st_size
    headers = {"Range": f"bytes={have}-", "Accept-Encoding": "identity"} if have else {"Accept-Encoding": "identity"}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_S) as answer:
        if answer.status_code == 416:
            return
        answer.raise_for_status()
        if answer.status_code != 206:
            have = 0
        expected = int(answer.headers.get("Content-Length", 0))
        require_space(part.parent, expected, f"downloading {part.stem}")
        told = 0.0
        with part.open("r+b") as file:
            file.truncate(have)
            file.seek(have)
            for chunk in answer.iter_content(CHUNK_BYTES):
                file.write(chunk)
                if time.monotonic() - told > REPORT_EVERY_S:
                    told = time.monotonic()
                    report(Progress(what=part.stem, done=file.tell(), total=have + expected, unit="bytes"))
            report(Progress(what=part.stem, done=file.tell(), total=file.tell(), unit="bytes"))


def _is_refusal(error: requests.RequestException) -> bool:
    """An answer such as 403 or 404, which will not change by asking again."""
    return error.response is not None and error.response.status_code not in BUSY
