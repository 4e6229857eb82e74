"""Environment variables that libraries read, made right before they read them, for this process and its children.

Containers and desktops set proxies that swallow requests to this machine, and users without a home or a name. Each
library has its own way to fail over that; all of them read the same variables. The command line imports this before
it knows whether it runs at all: nothing of it is heavy.
"""

import os
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PROXIES = ("http_proxy", "https_proxy", "all_proxy")
SERVERS = ("PREFECT_API_URL", "MLFLOW_TRACKING_URI", "MLFLOW_S3_ENDPOINT_URL", "AWS_ENDPOINT_URL", "HF_ENDPOINT")
"""Variables with the address of a server, which may be on this machine."""
NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Where `getpass.getuser` looks before it asks for the passwd entry."""


def keep_loopback_off_proxies() -> None:
    """List this machine in `no_proxy`: requests to it never go through a proxy, all others still do.

    httpx, requests, urllib, botocore and websockets read this list; each in its own way, so that it holds plain names
    and addresses only.
    """
    if not any(True for _ in _proxies()):
        return
    listed = [host.strip() for name in ("no_proxy", "NO_PROXY") for host in os.environ.get(name, "").split(",")]
    hosts = dict.fromkeys([*filter(None, listed), *LOOPBACK, *_loopback_servers()])
    everything = "*" in hosts  # some libraries know it only where it stands alone
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = "*" if everything else ",".join(hosts)


def check_proxies() -> None:
    """Refuse proxies that httpx cannot use: its clients would fail, those for this machine too.

    `socks://`, as desktops write it, is taken for SOCKS 5.

    Raises:
        QloraError: a variable holds no proxy, or one of another kind.
    """
    for name, value in list(_proxies()):
        if value.startswith("socks://"):
            os.environ[name] = value = f"socks5{value.removeprefix('socks')}"
        _check_proxy(name, value)


def give_user_a_home(root: Path) -> None:
    """Set `HOME` to a folder in the home of this installation where the user has none.

    Kubernetes and OpenShift run containers as a user without an entry in passwd, with `HOME` unset or `/`. Libraries
    keep caches and settings in that folder, and some take the user's name for the names of folders.

    Args:
        root: the home of this installation.
    """
    if not _has_home():
        os.environ["HOME"] = str(root / "user")
    if not any(os.environ.get(name) for name in NAMES):
        os.environ["LOGNAME"] = os.environ["USER"] = user_name()


def user_name() -> str:
    """Who runs this process; `uid-12345` for a user without a name."""
    named = next((os.environ[name] for name in NAMES if os.environ.get(name)), None)
    if named is not None:
        return named
    import pwd  # not on every platform, and one without it is refused in words

    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid-{os.getuid()}"


def expanded(path: Path, variable: str) -> Path:
    """A path with `~` resolved.

    Raises:
        QloraError: it begins with `~`, and this user has no home.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        from qlora_core.errors import QloraError

        raise QloraError(
            f"{variable} is {path}, and uid {os.getuid()} has no home: HOME is not set, and there is no passwd entry. "
            "Write an absolute path"
        ) from None


def _proxies() -> Iterator[tuple[str, str]]:
    """The variables that name a proxy, with their values."""
    for name in (*PROXIES, *map(str.upper, PROXIES)):
        if value := os.environ.get(name, ""):
            yield name, value


def _loopback_servers() -> Iterator[str]:
    """Hosts of this machine in the addresses of servers, such as Debian's 127.0.1.1."""
    for name in SERVERS:
        try:
            host = urlsplit(os.environ.get(name, "")).hostname or ""
            if ip_address(host).is_loopback:
                yield host
        except ValueError:  # a name, or no address
            continue


def _check_proxy(name: str, value: str) -> None:
    import httpx

    from qlora_core.errors import QloraError
    from tasks.settings import without_secrets

    try:
        httpx.Proxy(value if "://" in value else f"http://{value}")
    except (ValueError, httpx.InvalidURL):
        raise QloraError(
            f"{name} is {without_secrets(value)}; allowed are http://HOST:PORT, https://, socks5:// and socks5h://. "
            f"Correct it, or leave it out for this command: env -u {name} qlora ..."
        ) from None


def _has_home() -> bool:
    """Whether there is a folder of this user, or one can be made; it may hold tokens, also where it is read-only."""
    try:
        home = Path("~").expanduser()
    except RuntimeError:
        return False
    if home.is_dir() and home != Path(home.anchor):
        return True
    nearest = next((folder for folder in (home, *home.parents) if folder.is_dir()), Path())
    return home.is_absolute() and os.access(nearest, os.W_OK | os.X_OK)
