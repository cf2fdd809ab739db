"""Convert a checkpoint from Python: look at the plan, run it with progress, verify the result.

python examples/convert_from_python.py SOURCE OUTPUT
"""

import sys

import mfptq


def show(event: mfptq.Event) -> None:
    match event:
        case mfptq.Planned(total_bytes):
            print(f"{total_bytes / 1e9:.2f} GB to read")
        case mfptq.ShardFinished(name):
            print("finished", name)


def main(source: str, output: str) -> None:
    with mfptq.plan(source) as plan:
        print(plan)
        for row in plan.tensors[:5]:
            print(f"  {row.action:5} {row.name}: {row.reason} {row.rule}")
        report = plan.run(output, max_memory="1GiB", on_event=show)
    print(f"relative error {report.relative_error:.2%}")
    found = mfptq.verify(output, source)
    print("verified" if found.ok else found.faults[0])


if __name__ == "__main__":
    main(*sys.argv[1:3])
