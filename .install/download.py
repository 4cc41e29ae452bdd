"""Download a .tar.zst by its URL and write it to stdout unpacked, with a progress bar on stderr.

In Python, as a machine may have neither curl nor zstd.
"""

import sys

import requests
import zstandard

BAR_WIDTH = 25
CHUNK_BYTES = 1 << 20
SILENT_S = 60


def main(url):
    unpack = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)
    headers = {"Accept-Encoding": "identity"}  # so that the length is that of what comes
    reply = requests.get(url, stream=True, timeout=SILENT_S, headers=headers)
    reply.raise_for_status()
    total = int(reply.headers["Content-Length"])
    done = 0
    shown = None
    for chunk in reply.iter_content(CHUNK_BYTES):
        sys.stdout.buffer.write(unpack.decompress(chunk))
        done += len(chunk)
        percent = 100 * done // total
        if percent != shown:
            show(percent, total)
            shown = percent
    sys.stderr.write("\n")
    if done < total:
        raise OSError(f"it broke off after {done} of {total} bytes")


def show(percent, total):
    bar = "#" * (BAR_WIDTH * percent // 100)
    sys.stderr.write(f"\r[{bar:{BAR_WIDTH}}] {percent} % of {total // 1_000_000} MB ")
    sys.stderr.flush()


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except (requests.RequestException, zstandard.ZstdError, OSError, KeyError) as error:
        sys.exit(f"llm-service: the download failed: {error}")
