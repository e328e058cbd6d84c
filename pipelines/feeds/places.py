"""`Place`: where a service puts its files (a folder, a bucket, a web page of links), read in order of names.

A name is the path below the place's root, with `/` between its parts. Names that could lead elsewhere, links,
and files that are still being written are passed over.
"""

import os
import shutil
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from html.parser import HTMLParser
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote, urlencode, urljoin, urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import GCSStore, S3Store

from pipelines.feeds.web import Clock, DeniedError, NothingThereError, UnreachableError, Web
from pipelines.sources.source import PASSED_OVER, SAFE_NAME, listable, unlistable

PAGE = 1000  # names in one answer, the most that S3 gives
LARGEST_PAGE = 16 * 2**20  # bytes of one answer to a listing
SIGNED_FOR = timedelta(minutes=15)  # how long a signed URL may be used
REST = 60.0  # s without listings after a 429 or 503 whose Retry-After obstore does not show
KEPT_PAGES = 64  # web pages that are remembered, to ask only whether they changed
DEEPEST = 16  # folders in folders of a web page: links may lead round in a circle
S3_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
GS_CREDENTIALS = ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_KEY")


@dataclass(frozen=True)
class Entry:
    """One file as a listing shows it."""

    key: str  # the name below the root
    size: int | None  # bytes; None: the listing does not tell
    version: str  # another one means other bytes
    etag: str | None = None


Children = Callable[[str], list[Entry | str]]  # of a prefix: its files, and its folders as prefixes


class Place(Protocol):
    """Where files appear. Prefixes are empty or end in `/`."""

    root: str  # a path or URL ending in `/`

    def entries(self, prefix: str, after: str) -> Iterator[Entry]:
        """The files below a prefix whose keys sort after `after`, in order; asked for as they are taken.

        Raises:
            UnreachableError: if the place does not answer.
            DeniedError: if it refuses.
        """
        ...

    def folders(self, prefix: str) -> list[str]:
        """The prefixes of the folders right below a prefix, in order; raises as `entries` does."""
        ...

    def unfinished(self) -> Sequence[str]:
        """The keys that the last listing passed over because their files were still being written."""
        ...

    def unlisted(self) -> Mapping[str, str]:
        """The prefixes of the folders that the last listing could not look into, and why."""
        ...

    def local(self, entry: Entry) -> Path | None:
        """The file itself, if it lies on this machine."""
        ...

    def fetch(self, entry: Entry, path: Path, largest: int) -> None:
        """Stores a file at `path`, whole or not at all; raises as `entries` does.

        Raises:
            OSError: if it cannot be stored.
        """
        ...


def place_at(path: str, web: Web, quiet: float = 5.0) -> Place:
    """The place that a path or URL names.

    s3:// and gs:// are read without credentials unless the environment has some (AWS_*, GOOGLE_*), and
    AWS_ENDPOINT_URL is respected; https:// is a public bucket of S3 or Google where the host is theirs, else
    a folder that the server shows as a page of links. A local file must not have changed for `quiet` s.

    Raises:
        ValueError: for any other URL, or a folder that is not there or cannot be listed.
    """
    url = urlsplit(path)
    below = f"{url.path.strip('/')}/".lstrip("/")
    if "://" not in path:
        return Folder(path, web.clock, quiet)
    if url.scheme == "s3" and url.netloc:
        if _has_credentials(S3_CREDENTIALS, "AWS_SKIP_SIGNATURE"):
            return SignedBucket(f"s3://{url.netloc}/{below}", s3_store(url.netloc), below, web)
        return PublicBucket(_public_s3(url.netloc), below, web)
    if url.scheme == "gs" and url.netloc:
        if _has_credentials(GS_CREDENTIALS, "GOOGLE_SKIP_SIGNATURE"):
            return SignedBucket(f"gs://{url.netloc}/{below}", GCSStore(url.netloc), below, web)
        return PublicBucket(f"https://storage.googleapis.com/{url.netloc}/", below, web)
    if url.scheme == "https" and url.netloc.endswith(".amazonaws.com") and ".s3" in url.netloc:
        return PublicBucket(f"https://{url.netloc}/", below, web)
    if url.scheme == "https" and url.netloc == "storage.googleapis.com":
        bucket, _, prefix = below.partition("/")
        return PublicBucket(f"https://{url.netloc}/{bucket}/", prefix, web)
    if url.scheme == "https" or (url.scheme == "http" and url.hostname in ("localhost", "127.0.0.1", "::1")):
        return WebFolder(f"{url.scheme}://{url.netloc}/{below}", web)
    raise ValueError(
        f"{path}: expected a local folder, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX or https://HOST/FOLDER "
        "(http only on this machine: nothing protects it on the way)"
    )


class Folder:
    """A local folder and all below it."""

    def __init__(self, path: str, clock: Clock, quiet: float):
        """Raises ValueError if it is not there, is a file, or cannot be listed."""
        listable(path, "the files to follow")
        self.root = f"{path.rstrip('/')}/"
        self.clock = clock
        self.quiet = quiet
        self._changing: dict[str, tuple[str, float]] = {}  # by key: version, and when it was first seen
        self._unlisted: dict[str, str] = {}

    def entries(self, prefix: str, after: str) -> Iterator[Entry]:
        """The files below a prefix whose keys sort after `after`, in order, that are no longer written to."""
        before, self._changing, self._unlisted = self._changing, {}, {}
        for entry in _walk(self._children, prefix, after):
            version, since = before.get(entry.key, ("", 0.0))
            since = since if version == entry.version else self.clock.seconds()
            if self._is_quiet(entry, since):
                yield entry
            else:
                self._changing[entry.key] = (entry.version, since)

    def folders(self, prefix: str) -> list[str]:
        """The prefixes of the folders right below a prefix, in order."""
        return [child for child in self._children(prefix) if isinstance(child, str)]

    def unfinished(self) -> Sequence[str]:
        """The keys that the last listing passed over because their files were still being written."""
        return list(self._changing)

    def unlisted(self) -> Mapping[str, str]:
        """The prefixes of the folders that the last listing could not look into, and why."""
        return self._unlisted

    def local(self, entry: Entry) -> Path | None:
        """The file itself."""
        return Path(self.root + entry.key)

    def fetch(self, entry: Entry, path: Path, largest: int) -> None:
        """Copies a file; nobody who asked for `local` needs it."""
        shutil.copyfile(self.root + entry.key, path)

    def _children(self, prefix: str) -> list[Entry | str]:
        children: list[Entry | str] = []
        try:
            with os.scandir(self.root + prefix) as found:
                for item in found:
                    children.extend(_child(item, prefix))
        except OSError as error:
            if not prefix or not Path(self.root).is_dir():
                raise UnreachableError(f"{self.root}{prefix}: cannot be listed: {error.strerror}") from error
            if not isinstance(error, FileNotFoundError):  # else this folder went away meanwhile
                self._unlisted[prefix] = unlistable(self.root + prefix.rstrip("/"), error)
        return children

    def _is_quiet(self, entry: Entry, since: float) -> bool:
        """Whether nobody wrote to a file for a while, by its own time or by ours where clocks differ."""
        age = self.clock.now().timestamp() - int(entry.version.split("-")[1]) / 1e9
        return age >= self.quiet or self.clock.seconds() - since >= self.quiet


class PublicBucket:
    """A bucket that anyone may read, by the plain requests of S3 (ListObjectsV2; Google answers them too)."""

    def __init__(self, bucket: str, prefix: str, web: Web):
        """`bucket` is its URL, ending in `/`."""
        self.root = bucket + prefix
        self.bucket = bucket
        self.prefix = prefix
        self.web = web

    def entries(self, prefix: str, after: str) -> Iterator[Entry]:
        """The files below a prefix whose keys sort after `after`, in order, a page of 1,000 at a time."""
        query = (
            {"prefix": self.prefix + prefix, "start-after": self.prefix + after}
            if after
            else {"prefix": self.prefix + prefix}
        )
        for page in self._pages(query):
            for item in page.iterfind("{*}Contents"):
                key = item.findtext("{*}Key", "").removeprefix(self.prefix)
                etag, size = item.findtext("{*}ETag", ""), item.findtext("{*}Size", "")
                if is_safe(key) and key > after and size.isdecimal():
                    yield Entry(key, int(size), f"{etag}-{size}", etag or None)

    def folders(self, prefix: str) -> list[str]:
        """The prefixes of the folders right below a prefix, in order."""
        found = [
            item.findtext("{*}Prefix", "").removeprefix(self.prefix)
            for page in self._pages({"prefix": self.prefix + prefix, "delimiter": "/"})
            for item in page.iterfind("{*}CommonPrefixes")
        ]
        return sorted(folder for folder in found if is_safe(folder.removesuffix("/")))

    def unfinished(self) -> Sequence[str]:
        """None: a file is there when it is whole."""
        return ()

    def unlisted(self) -> Mapping[str, str]:
        """None: what this user may not list is an error of the whole."""
        return {}

    def local(self, entry: Entry) -> Path | None:
        """None: it lies elsewhere."""
        return None

    def fetch(self, entry: Entry, path: Path, largest: int) -> None:
        """Stores a file at `path`, whole or not at all."""
        url = self.bucket + quote(self.prefix + entry.key)
        self.web.download(url, path, largest, entry.size, entry.etag)

    def _pages(self, query: dict[str, str]) -> Iterator[ElementTree.Element]:
        """The pages of one listing."""
        token: dict[str, str] = {}
        while True:
            asked = urlencode({"list-type": "2", "max-keys": str(PAGE), **query, **token})
            page = self.web.page(f"{self.bucket}?{asked}", LARGEST_PAGE)
            assert page is not None  # nothing was said to be known
            root = _xml(page.body, self.bucket)
            yield root
            following = root.findtext("{*}NextContinuationToken", "")
            if root.findtext("{*}IsTruncated") != "true":
                return
            if following in ("", token.get("continuation-token")):
                raise UnreachableError(f"{self.bucket}: a listing that goes on, but does not say where")
            token = {"continuation-token": following}


class SignedBucket:
    """A bucket that wants credentials: listed by obstore, which knows every kind, and read by signed URLs.

    After a 429 or a 503 obstore does not tell the Retry-After; so listings rest for a minute then.
    """

    def __init__(self, root: str, store: S3Store | GCSStore, prefix: str, web: Web):
        """`store` is of the whole bucket, `prefix` the part to read."""
        self.root = root
        self.store = store
        self.prefix = prefix
        self.web = web

    def entries(self, prefix: str, after: str) -> Iterator[Entry]:
        """The files below a prefix whose keys sort after `after`, in order, a page of 1,000 at a time."""
        offset = self.prefix + after if after else None
        try:
            for chunk in obstore.list(
                self.store, (self.prefix + prefix) or None, offset=offset, chunk_size=1000
            ):
                for item in chunk:
                    key, etag = item["path"].removeprefix(self.prefix), item["e_tag"]
                    if is_safe(key) and key > after:
                        yield Entry(key, item["size"], f"{etag}-{item['size']}", etag)
        except (BaseError, OSError) as error:
            raise refusal(self.root, error) from None

    def folders(self, prefix: str) -> list[str]:
        """The prefixes of the folders right below a prefix, in order."""
        try:
            found = obstore.list_with_delimiter(self.store, (self.prefix + prefix) or None)["common_prefixes"]
        except (BaseError, OSError) as error:
            raise refusal(self.root, error) from None
        folders = [folder.removeprefix(self.prefix) for folder in found]
        return sorted(f"{folder}/" for folder in folders if is_safe(folder))

    def unfinished(self) -> Sequence[str]:
        """None: a file is there when it is whole."""
        return ()

    def unlisted(self) -> Mapping[str, str]:
        """None: what this user may not list is an error of the whole."""
        return {}

    def local(self, entry: Entry) -> Path | None:
        """None: it lies elsewhere."""
        return None

    def fetch(self, entry: Entry, path: Path, largest: int) -> None:
        """Stores a file at `path`, whole or not at all."""
        try:
            url = obstore.sign(self.store, "GET", self.prefix + entry.key, SIGNED_FOR)
        except (BaseError, OSError) as error:
            raise refusal(self.root, error) from None
        self.web.download(url, path, largest, entry.size, entry.etag)


class WebFolder:
    """A folder of a web server that shows it as a page of links, as Apache and nginx do."""

    def __init__(self, root: str, web: Web):
        """`root` is its URL, ending in `/`."""
        self.root = root
        self.web = web
        self._pages: dict[str, tuple[dict[str, str], list[Entry | str]]] = {}
        self._unlisted: dict[str, str] = {}

    def entries(self, prefix: str, after: str) -> Iterator[Entry]:
        """The files below a prefix whose keys sort after `after`, in order."""
        self._unlisted = {}
        yield from _walk(self._children, prefix, after)

    def folders(self, prefix: str) -> list[str]:
        """The prefixes of the folders right below a prefix, in order."""
        return [child for child in self._children(prefix) if isinstance(child, str)]

    def unfinished(self) -> Sequence[str]:
        """None: a file is there when it is whole."""
        return ()

    def unlisted(self) -> Mapping[str, str]:
        """The prefixes of the folders that the server refused at the last listing, and why."""
        return self._unlisted

    def local(self, entry: Entry) -> Path | None:
        """None: it lies elsewhere."""
        return None

    def fetch(self, entry: Entry, path: Path, largest: int) -> None:
        """Stores a file at `path`, whole or not at all."""
        self.web.download(self.root + quote(entry.key), path, largest, None, None)

    def _children(self, prefix: str) -> list[Entry | str]:
        if prefix.count("/") > DEEPEST:
            raise DeniedError(
                f"{self.root}{prefix}: its links lead ever deeper; give the folder that holds the files"
            )
        known, children = self._pages.pop(prefix, ({}, []))
        try:
            page = self.web.page(self.root + quote(prefix), LARGEST_PAGE, known)
        except DeniedError as error:
            if not prefix:
                raise
            if not isinstance(error, NothingThereError):  # as of one that went away
                self._unlisted[prefix] = f"{error}, so nothing in it is read"
            return []
        if page is not None:
            validators = (("ETag", "If-None-Match"), ("Last-Modified", "If-Modified-Since"))
            known = {ask: page.headers[told] for told, ask in validators if told in page.headers}
            children = _links(page.body.decode(errors="replace"), self.root + quote(prefix), prefix)
        self._pages[prefix] = known, children
        while len(self._pages) > KEPT_PAGES:
            del self._pages[next(iter(self._pages))]
        return children


class _Links(HTMLParser):
    """The links of a page, each with the text of its row behind it (date and size)."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[tuple[str, list[str]]] = []
        self._inside = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """A link begins."""
        if tag == "a" and (target := dict(attrs).get("href")):
            self.links.append((target, []))
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        """A link ends."""
        self._inside = self._inside and tag != "a"

    def handle_data(self, data: str) -> None:
        """Text, of a link or behind it."""
        if self.links and not self._inside:
            self.links[-1][1].extend(data.split())


def is_safe(key: str) -> bool:
    """Whether every part of a key is a name that leads nowhere else, and the last no half of a file."""
    parts = key.split("/")
    return not PASSED_OVER.fullmatch(parts[-1]) and all(
        SAFE_NAME.fullmatch(part) and part not in (".", "..") for part in parts
    )


def _walk(children: Children, prefix: str, after: str) -> Iterator[Entry]:
    """The files below a prefix, in order of keys; folders that end before `after` are not opened."""
    for child in sorted(children(prefix), key=lambda child: child if isinstance(child, str) else child.key):
        if isinstance(child, Entry):
            if child.key > after:
                yield child
        elif child > after or after.startswith(child):
            yield from _walk(children, child, after)


def _child(item: os.DirEntry[str], prefix: str) -> Iterator[Entry | str]:
    """What a folder holds under one name, if that is a folder, or a file of a safe name."""
    if item.is_dir(follow_symlinks=False):
        if not PASSED_OVER.fullmatch(item.name):  # any other name will do: it leads nowhere but here
            yield f"{prefix}{item.name}/"
    elif is_safe(item.name) and item.is_file(follow_symlinks=False):
        with suppress(FileNotFoundError):  # it went away meanwhile
            told = item.stat(follow_symlinks=False)
            version = f"{told.st_size}-{told.st_mtime_ns}-{told.st_ino}"
            yield Entry(prefix + item.name, told.st_size, version)


def _links(page: str, url: str, prefix: str) -> list[Entry | str]:
    """What the links of a page lead to right below it."""
    parser = _Links()
    parser.feed(page)
    children: dict[str, Entry | str] = {}
    for target, behind in parser.links:
        below = urljoin(url, target.partition("?")[0])
        name = unquote(below.removeprefix(url)) if below.startswith(url) else ""
        if is_safe(name.removesuffix("/")) and "/" not in name.removesuffix("/"):
            key = prefix + name
            children[key] = key if name.endswith("/") else Entry(key, None, " ".join(behind))
    return list(children.values())


def _xml(body: bytes, shown: str) -> ElementTree.Element:
    """The page of a listing; entities, which could grow without bound, are no part of one."""
    try:
        if b"<!" in body:
            raise ElementTree.ParseError("a document type")
        root = ElementTree.fromstring(body)
    except ElementTree.ParseError as error:
        raise UnreachableError(f"{shown}: the listing is no sound XML ({error})") from None
    if not root.tag.endswith("ListBucketResult"):
        raise DeniedError(f"{shown}: answered with {root.tag}, expected the listing of a bucket")
    return root


def refusal(root: str, error: Exception) -> UnreachableError | DeniedError:
    """An error of obstore, in one line, as one to try again after or not."""
    said = f"{root}: {str(error).strip().splitlines()[0]}"
    missing = "404 Not Found" in said  # a bucket that is not there is no error of its own in obstore
    if missing or isinstance(error, PermissionDeniedError | UnauthenticatedError | FileNotFoundError):
        return DeniedError(said)
    throttled = "429" in said or "503" in said
    return UnreachableError(said, REST if throttled else 0.0)


def _has_credentials(names: tuple[str, ...], skip: str) -> bool:
    wants_none = os.environ.get(skip, "").lower() in ("1", "true", "yes")
    return not wants_none and any(os.environ.get(name) for name in names)


def _endpoint() -> str | None:
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def _public_s3(bucket: str) -> str:
    """The URL of a public bucket; Amazon's names of hosts lead to its region, whichever that is."""
    if endpoint := _endpoint():
        return f"{endpoint.rstrip('/')}/{bucket}/"
    if "." in bucket:  # which no certificate covers as the name of a host
        return f"https://s3.amazonaws.com/{bucket}/"
    return f"https://{bucket}.s3.amazonaws.com/"


def s3_store(bucket: str) -> S3Store:
    """A bucket by the keys, region and endpoint of the usual AWS_* environment; one request is one try."""
    endpoint = _endpoint()
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
    return S3Store(
        bucket,
        endpoint=endpoint,
        region=region,
        virtual_hosted_style_request=endpoint is None,
        client_options={"allow_http": endpoint is not None and endpoint.startswith("http://")},
        retry_config={"max_retries": 0},  # the feed itself tries again, with a longer breath
    )
