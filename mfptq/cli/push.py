"""Define `mfptq push`, and the options of `convert` that publish. Thin: `output.publish` does it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from .options import json_option, together

publish_options = together(
    click.option("--push-to-hub", metavar="REPO", help="Publish: upload shards while later ones are made."),
    click.option("--private", is_flag=True, help="Make that repo private, if it is made now."),
    click.option("--discard-output", is_flag=True, help="Remove each shard here once it is uploaded."),
)


@click.command()
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repo private, if it is made now.")
@click.option("--revision", help="Branch to commit to; a new one holds this output alone.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--token", help="Hub token; HF_TOKEN and a stored login work too.")
@json_option
def push(output: Path, repo: str, as_json: bool, **options: object) -> None:
    """Publish the finished OUTPUT as the Hub repo REPO: one commit, compared with every file here; rerun to resume.

    Example: mfptq push Qwen3.5-27B-NVFP4 me/Qwen3.5-27B-NVFP4 --private
    """
    from dataclasses import asdict

    from ..output.publish import PushTarget
    from ..output.publish import push as publish
    from .progress import UploadLines

    on_terminal = sys.stderr is None or sys.stderr.isatty()  # there the Hub's client draws bars itself
    lines = None if on_terminal else UploadLines(sys.stderr)
    done = publish(output, PushTarget(repo, **options), lines and lines.show_upload)  # type: ignore[arg-type]
    click.echo(json.dumps(asdict(done)) if as_json else f"{done.files} files of {output} are published: {done.url}")
