"""Ask `tldist serve` about images, eight at a time: the standard library, nothing else.

    python client.py http://127.0.0.1:8000 IMAGE ...

One request an image: the server puts those that wait together into batches by itself. 503 means that its queue is
full: wait as long as it says and ask again. Any other error says why, in JSON.
"""
import json
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SERVER, FILES = sys.argv[1], sys.argv[2:]
ATTEMPTS = 5


def ask(file):
    """Label and probability, or the reason why there are none."""
    data = Path(file).read_bytes()
    request = urllib.request.Request(f"{SERVER}/predict?top=1", data, {"Content-Type": "application/octet-stream"})
    for attempt in range(ATTEMPTS):
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                [found] = json.load(response)["predictions"]
                return f"{found['label']}\t{found['probability']:.4f}"
        except urllib.error.HTTPError as error:
            if error.code != 503 or attempt == ATTEMPTS - 1:
                return f"error {error.code}\t{json.load(error)['error']}"
            time.sleep(float(error.headers.get("Retry-After", 1)))


with ThreadPoolExecutor(8) as pool:
    for file, answer in zip(FILES, pool.map(ask, FILES)):
        print(f"{file}\t{answer}")
