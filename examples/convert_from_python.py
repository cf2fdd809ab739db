"""Convert a checkpoint from Python, with progress and the report.

python examples/convert_from_python.py SOURCE OUTPUT
"""

import sys

import mfptq


def main(source: str, output: str) -> None:
    def show(event: mfptq.Progress) -> None:
        if event.finished:
            print("finished", event.finished)

    report = mfptq.convert(source, output, max_memory="1GiB", progress=show)
    print(
        f"{report.source_bytes / 1e9:.2f} GB -> {report.output_bytes / 1e9:.2f} GB, error {report.relative_error:.2%}"
    )
    found = mfptq.verify(output, source)
    print("verified" if found.ok else found.faults[0])


if __name__ == "__main__":
    main(*sys.argv[1:3])
