"""Publishing: one commit, compared file by file, resumed where it broke off, and never a token where it does not belong."""

import shutil
from pathlib import Path

import pytest

import mfptq
from mfptq.errors import DestinationError, HubError, VerificationError
from mfptq.output.evaluations import FIGURES, record_evaluation
from mfptq.output.publish import Publisher, PushTarget, StoredFile, push
from tests.conftest import digests
from tests.hub.conftest import TOKEN
from tests.hub.server import Content, LoopbackHub, Repo

TARGET = PushTarget("me/made", token=TOKEN)


@pytest.fixture(scope="module")
def made(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(kept / "source", folder / "source")
    (folder / "source" / "1_Pooling").mkdir()
    (folder / "source" / "1_Pooling" / "config.json").write_text("{}")
    mfptq.convert(folder / "source", folder / "out")
    return folder / "out"


@pytest.fixture
def output(made: Path, tmp_path: Path) -> Path:
    """A finished output with a folder in it."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def published(hub: LoopbackHub) -> dict[str, str]:
    return {name: content.sha256 for name, content in hub.repos["me/made"].commits[-1][1].items()}


def uploads(hub: LoopbackHub) -> int:
    return len([each for each in hub.asked if each.method == "PUT"])


def test_a_finished_output_becomes_one_commit(client: LoopbackHub, output: Path) -> None:
    done = push(output, TARGET)
    assert published(client) == digests(output)
    assert len(client.repos["me/made"].commits) == 2  # the empty one, and ours
    assert (done.commit, done.files) == (client.repos["me/made"].commits[-1][0], len(digests(output)))
    assert not client.repos["me/made"].private
    assert {each.authorization for each in client.asked if each.host == "storage"} == {""}
    client.reset_counts()
    assert push(output, TARGET).commit == done.commit  # nothing to send, nothing to commit
    assert not uploads(client)


def test_evaluations_and_an_edited_card_are_published(client: LoopbackHub, output: Path) -> None:
    estimate = {"value": 0.125, "standard_error": None}
    figures = dict.fromkeys(FIGURES, estimate)
    about = {"source": "s", "output": "o", "dataset": "text.jsonl", "digest": "0", "dtype": "bfloat16", "samples": 3}
    record_evaluation(output, about | figures)
    push(output, TARGET)
    assert published(client) == digests(output)
    assert "mfptq_evaluation.json" in published(client)
    assert b"| text.jsonl | 3 | 0.125 |" in client.repos["me/made"].commits[-1][1]["README.md"].data


def test_what_was_published_can_be_read_again(client: LoopbackHub, output: Path, source: Path) -> None:
    push(output, PushTarget("me/made", private=True, token=TOKEN))
    assert client.repos["me/made"].private
    found = mfptq.inspect("me/made", token=TOKEN)
    assert found.quantization is not None


def test_the_command_says_where_it_is(hub: LoopbackHub, run, output: Path) -> None:
    done = run("push", output, "me/made", "--token", TOKEN)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(" finished: ") == len(digests(output))
    assert "/me/made/commit/" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert published(hub) == digests(output)
    refused = run("push", output, "me/other")
    assert refused.returncode == 7
    assert "401" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_an_interrupted_push_goes_on(client: LoopbackHub, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = sorted(output.glob("*.safetensors"))
    client.fault("400", f"storage PUT /{Content.of(shards[1]).sha256}")
    with pytest.raises(HubError):
        push(output, TARGET)
    assert len(client.repos["me/made"].commits) == 1  # nothing is visible
    client.faults.clear()
    client.reset_counts()
    push(output, TARGET)
    assert uploads(client) < len(shards)
    assert published(client) == digests(output)


def test_a_file_may_be_gone_once_it_is_uploaded_even_for_another_process(client: LoopbackHub, output: Path) -> None:
    whole = digests(output)
    files = [StoredFile(name, sha, (output / name).stat().st_size) for name, sha in whole.items()]
    first = Publisher(output, TARGET)
    first.open()
    gone = [file for file in files if file.name.endswith(".safetensors")]
    for file in gone:
        first.upload(file)
        (output / file.name).unlink()
    second = Publisher(output, TARGET)
    second.open()
    assert all(second.trust(file) for file in gone)
    assert not second.trust(StoredFile("model-9.safetensors", "0" * 64, 5))
    second.commit(files)
    assert published(client) == whole


def test_a_foreign_repo_is_not_touched(client: LoopbackHub, output: Path, source: Path) -> None:
    client.add(source, "me/made")
    with pytest.raises(HubError, match="holds other files"):
        push(output, PushTarget("me/made", token=TOKEN))
    assert len(client.repos["me/made"].commits) == 1
    done = push(output, PushTarget("me/made", create_pr=True, token=TOKEN))
    assert done.url.endswith("/discussions/1")


def test_a_lost_race_is_said_to_be_one(client: LoopbackHub, output: Path) -> None:
    publisher = Publisher(output, TARGET)
    publisher.open()
    client.repos["me/made"].commit({"note.txt": Content.of(b"x")})
    with pytest.raises(HubError, match="commit to 'me/made'"):
        publisher.commit([StoredFile("config.json", "", (output / "config.json").stat().st_size)])
    assert len(client.repos["me/made"].commits) == 2


def test_a_damaged_or_unfinished_output_is_not_pushed(client: LoopbackHub, output: Path, source: Path) -> None:
    with pytest.raises(DestinationError, match="no finished output"):
        push(source, TARGET)
    with next(output.glob("*.safetensors")).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(VerificationError, match="damaged"):
        push(output, TARGET)
    assert "me/made" not in client.repos


def test_uploads_are_tried_again(client: LoopbackHub, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(http.time, "sleep", lambda _seconds: None)
    client.fault("503", "storage PUT", 2)
    push(output, TARGET)
    assert published(client) == digests(output)


def on_branch(hub: LoopbackHub, name: str) -> dict[str, str]:
    return {name: content.sha256 for name, content in hub.repos["me/made"].branches[name][-1][1].items()}


@pytest.mark.parametrize("branch", ["fp4", "formats/fp4"])
def test_a_branch_is_made_and_holds_this_output_alone(
    branch: str, client: LoopbackHub, output: Path, source: Path
) -> None:
    client.repos["me/made"] = Repo()
    client.repos["me/made"].commit({})
    client.add(source, "me/made")  # main holds another model
    target = PushTarget("me/made", revision=branch, token=TOKEN)
    done = push(output, target)
    assert on_branch(client, branch) == digests(output)
    assert len(client.repos["me/made"].commits) == 2  # main is as it was
    client.reset_counts()
    assert push(output, target).commit == done.commit  # the branch is there, and nothing is to send
    assert not uploads(client)


def test_a_branch_that_exists_gets_the_commit(client: LoopbackHub, output: Path, source: Path) -> None:
    repo = client.repos["me/made"] = Repo()
    repo.commit({})
    repo.branches["fp4"] = [repo.commits[0]]
    push(output, PushTarget("me/made", revision="fp4", token=TOKEN))
    assert on_branch(client, "fp4") == digests(output)
    repo.branches["old"] = [(client.add(source, "me/made"), repo.commits[-1][1])]
    with pytest.raises(HubError, match="'me/made', branch 'old', holds other files"):
        push(output, PushTarget("me/made", revision="old", token=TOKEN))


def test_no_branch_is_made_of_a_repo_that_began_with_other_files(
    client: LoopbackHub, output: Path, source: Path
) -> None:
    client.add(source, "me/made")
    with pytest.raises(HubError, match="holds other files"):
        push(output, PushTarget("me/made", revision="fp4", token=TOKEN))
    assert not client.repos["me/made"].branches


def test_the_command_makes_the_branch(hub: LoopbackHub, run, output: Path) -> None:
    done = run("push", output, "me/made", "--revision", "fp4", "--token", TOKEN)
    assert done.returncode == 0, done.stderr
    assert on_branch(hub, "fp4") == digests(output)
    missing = run("push", output, "me/made", "--revision", "none", "--create-pr", "--token", TOKEN)
    assert missing.returncode == 7
    assert "has no revision 'none'" in missing.stderr
