"""Download a .tar.zst by its URL and unpack it into a folder, with a progress bar on stderr.

In Python, as a machine may have neither curl nor zstd.
"""

import subprocess
import sys
import urllib.parse

import requests
import zstandard

BAR_WIDTH = 25
CHUNK_BYTES = 1 << 20
SILENT_S = 60


def main(url, folder):
    unpack = zstandard.ZstdDecompressor().decompressobj(read_across_frames=True)
    headers = {"Accept-Encoding": "identity"}  # so that the length is that of what comes
    reply = requests.get(url, stream=True, timeout=SILENT_S, headers=headers)
    reply.raise_for_status()
    total = int(reply.headers["Content-Length"])
    done = 0
    shown = None
    with subprocess.Popen(["tar", "-x", "-C", folder], stdin=subprocess.PIPE) as tar:
        for chunk in reply.iter_content(CHUNK_BYTES):
            tar.stdin.write(unpack.decompress(chunk))
            done += len(chunk)
            percent = 100 * done // total
            if percent != shown:
                show(percent, total)
                shown = percent
    sys.stderr.write("\n")
    if done < total:
        raise OSError(f"it broke off after {done} of {total} bytes")
    if tar.returncode:
        raise OSError(f"tar ended with {tar.returncode}")


def show(percent, total):
    bar = "#" * (BAR_WIDTH * percent // 100)
    sys.stderr.write(f"\r[{bar:{BAR_WIDTH}}] {percent} % of {total // 1_000_000} MB ")
    sys.stderr.flush()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except requests.ConnectionError:
        host = urllib.parse.urlsplit(sys.argv[1]).hostname
        sys.exit(f"llm-service: the download failed: no connection to {host}")
    except (requests.RequestException, zstandard.ZstdError, OSError, KeyError) as error:
        sys.exit(f"llm-service: the download failed: {error}")
