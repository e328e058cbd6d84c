"""The command line: what it teaches, and what it answers to wrong words."""

import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cli

ROOT = Path(__file__).parent.parent


@pytest.fixture
def door(tmp_path, monkeypatch):
    """A command `ingest` with two small groups, whose call is recorded."""
    files = {
        "ingest.yaml": """\
# Do a thing.
#
# At length.
#
# Examples:
#   metnet ingest where=x
defaults:
  - fruit: apple
  - fruit@other: pear
  - _self_
_target_: tests.test_cli.record
where: ???  # folder of it
count: 3  # how many
ready: false  # whether
nested:
  depth: 1.5  # metres
window: null  # whole numbers
when: null  # a time
""",
        "fruit/apple.yaml": "# Red.\ndefaults:\n  - /skin@skin: red\n  - _self_\n_target_: tests.test_cli.Apple\nseeds: 5  # pips\n",
        "skin/red.yaml": "# As it is.\n_target_: tests.test_cli.Skin\nname: red\n",
        "skin/green.yaml": "# Not yet.\n_target_: tests.test_cli.Skin\nname: green\n",
        "fruit/pear.yaml": "# Green.\n_target_: tests.test_cli.Apple\nseeds: 7  # pips\n",
        "fruit/from_path.yaml": "# From a file.\n_target_: tests.test_cli.Apple\nseeds: ${.path}\npath: ???  # the file\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(cli, "CONFIGS", tmp_path)
    return tmp_path


class Apple:
    def __init__(self, seeds, path=None, skin=None):
        self.seeds = seeds if skin is None or skin.name == "red" else skin.name


class Skin:
    def __init__(self, name):
        self.name = name


def record(config, window: list[int] | None = None, when: str | None = None, **arguments):
    arguments |= {key: value for key, value in (("window", window), ("when", when)) if value is not None}
    if arguments["where"] == "nowhere":
        raise ValueError("no such\nplace")
    if arguments["where"] == "broken":
        raise RuntimeError("inner trouble")
    if Path(arguments["where"]).name == "half":
        try:
            Path(arguments["where"]).touch()
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        finally:
            Path(arguments["where"]).unlink()
    return sorted((key, getattr(value, "seeds", value)) for key, value in arguments.items())


def test_words_become_a_call(door, capsys):
    code = cli.answer("ingest", ["where=a b,c", "count=4", "fruit=pear", "other.seeds=9", "nested.depth=2"])

    assert code == 0
    said = capsys.readouterr().out.strip()
    assert said == str(
        [
            ("count", 4),
            ("fruit", 7),
            ("nested", {"depth": 2}),
            ("other", 9),
            ("ready", False),
            ("where", "a b,c"),
        ]
    )


def test_a_path_may_stand_where_a_group_has_names(door, capsys):
    assert cli.answer("ingest", ["where=x", "other=my/fruit box"]) == 0
    assert "('other', 'my/fruit box')" in capsys.readouterr().out


@pytest.mark.parametrize("word", ["~nested.depth", "~nested.depth=1.5"])
def test_a_key_is_taken_away(door, capsys, word):
    assert cli.answer("ingest", ["where=x", word]) == 0
    assert "('nested', {})" in capsys.readouterr().out


def test_a_key_that_was_added_is_taken_away_again(door, capsys):
    assert cli.answer("ingest", ["where=x", "+nested.more=5", "~nested.more"]) == 0
    assert "('nested', {'depth': 1.5})" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["3", "nomodule.Nope"])
def test_what_cannot_be_called_is_said_once(door, capsys, target):
    assert cli.answer("ingest", ["where=x", f"other._target_={target}"]) != 0
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("word", ["~fruit.skin", "~skin"])
def test_a_group_and_a_key_without_a_value_are_taken_away(door, capsys, word):
    assert cli.answer("ingest", ["where=x", "fruit.skin=green", word, "~window"]) == 0
    assert "('fruit', 5)" in capsys.readouterr().out


@pytest.mark.parametrize("path", ["2020", "007", "1e3", "true", "[x]", "it's"])
def test_a_path_is_text_whatever_it_looks_like(door, capsys, path):
    assert cli.answer("ingest", [f"where={path}"]) == 0
    assert str(("where", path)) in capsys.readouterr().out


def test_the_home_folder_stands_behind_a_key_too(door, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert cli.answer("ingest", ["where=~/rain"]) == 0
    assert "('where', '/home/me/rain')" in capsys.readouterr().out


def test_a_time_of_digits_stays_text(door, capsys):
    assert cli.answer("ingest", ["where=x", "when=20200601"]) == 0
    assert "('when', '20200601')" in capsys.readouterr().out


def test_inspect_takes_one_bare_path_with_any_sign_in_it(tmp_path, capsys):
    assert cli.answer("inspect", [str(tmp_path / "a b=c")]) == 1
    assert "a b=c: no such folder" in capsys.readouterr().err
    assert cli.answer("inspect", [f"path={tmp_path}", "~nonsense"]) == 2
    assert "no key 'nonsense'; the keys are: group" in capsys.readouterr().err
    assert cli.answer("inspect", ["a", "b"]) == 2
    assert "a b: expected one path" in capsys.readouterr().err


def test_a_member_of_a_group_may_have_groups_of_its_own(door, capsys):
    assert cli.answer("ingest", ["where=x", "fruit.skin=green"]) == 0
    assert "('fruit', 'green')" in capsys.readouterr().out
    assert cli.answer("ingest", ["where=x", "skin=green"]) == 0
    assert "('fruit', 'green')" in capsys.readouterr().out, "the key may stand alone"
    assert cli.answer("ingest", ["where=x", "fruit.skin=grene"]) == 2
    assert "did you mean 'green'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["wher=x"], 2, "did you mean 'where'"),
        (
            ["where=x", "nested.dept=2"],
            2,
            "did you mean 'nested.depth'?; the keys of nested are: nested.depth",
        ),
        ([], 2, "missing where= (folder of it)"),
        (["where"], 2, "expected key=value"),
        (["~/where"], 2, "expected key=value"),
        (["where=x", "~wher"], 2, "no key 'wher'; did you mean 'where'?"),
        (["where=x", "~fruit.seeds"], 2, "~fruit.seeds: tests.test_cli.Apple cannot do without seeds"),
        (["where=x", "~fruit.skin", "~skin"], 2, "~fruit.skin: it is gone already"),
        (["where=x", "other._target_=tests.test_cli.Skin"], 2, "other.seeds: tests.test_cli.Skin takes no"),
        (["where=x", "count=many"], 2, "count=many: expected a whole number, such as 3"),
        (["where=x", "ready=1"], 2, "expected true or false"),
        (["where=x", "window=5"], 2, "window=5: expected a list (each a whole number) or null"),
        (["where=x", "window=[1,2.5]"], 2, "window=[1, 2.5]: expected a list"),
        (["where=x", "when=[1]"], 2, "when=[1]: expected text or null"),
        (["where="], 2, "where=: expected a value"),
        (["where=x", "other="], 2, "other=: expected a value"),
        (["where=nowhere"], 1, "metnet ingest: no such place"),
        (["where=broken"], 1, "RuntimeError: inner trouble"),
    ],
)
def test_what_goes_wrong_is_said_in_one_line(door, capsys, words, code, said):
    assert cli.answer("ingest", words) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert captured.err.count("\n") == 1


def test_debug_shows_the_traceback(door):
    with pytest.raises(RuntimeError, match="inner trouble"):
        cli.answer("ingest", ["where=broken", "--debug"])


def test_what_is_told_to_end_puts_away_what_it_has_begun(door, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        cli.answer("ingest", [f"where={tmp_path / 'half'}"])
    assert ended.value.code == 143
    assert not (tmp_path / "half").exists()
    assert signal.getsignal(signal.SIGTERM) == before


STEP = """
import os, pathlib, signal, sys, time
try:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
finally:
    time.sleep(0.5)
    pathlib.Path(sys.argv[1]).write_text("in order")
"""


def test_the_command_that_a_demo_is_at_is_told_to_end_with_it(door, tmp_path, monkeypatch):
    (tmp_path / "step.py").write_text(STEP)
    (tmp_path / "demo.yaml").write_text(f"# All.\nsteps:\n  - [{tmp_path / 'ended'}]\n")
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "step.py"))
    with pytest.raises(SystemExit) as ended:
        cli.answer("demo", [])
    assert ended.value.code == 143
    assert (tmp_path / "ended").read_text() == "in order"


def test_help_teaches_keys_defaults_and_examples(door, capsys):
    assert cli.answer("ingest", ["--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in ("Do a thing.", "At length.", "where required folder of it", "nested.depth 1.5 metres"):
        assert part in said
    for part in (
        "fruit=pear Green.",
        "fruit.seeds 7 pips",
        "other=PATH From a file.",
        "metnet ingest where=x",
    ):
        assert part in said


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_two_examples_and_says_every_key(command):
    page = cli.read_page(cli.CONFIGS / f"{command}.yaml")
    assert page.summary.endswith(".")
    assert len(page.examples) >= 2
    text = (cli.CONFIGS / f"{command}.yaml").read_text()
    assert {key.name.split(".")[0] for key in page.keys} | {group[0] for group in page.groups}
    for line in text.splitlines():
        if line and not line.startswith(("#", " ", "_", "defaults", "steps", "made", "served")):
            key = line.partition(":")[0]
            assert any(known.name.split(".")[0] == key for known in page.keys), f"{key} has no comment"


def test_help_answers_at_once_because_it_loads_no_heavy_library():
    code = (
        "import sys, cli; sys.argv = ['metnet', 'train', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'hydra', 'xarray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "trainer.max_steps" in done.stdout


def test_unknown_commands_are_wrong_usage():
    done = subprocess.run([sys.executable, "cli.py", "ingset"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "ingest" in done.stderr


def test_a_list_of_paths_is_a_list_and_a_folder_of_that_name_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.compose("train", ["cube=[a/b,s3://c/d]", "run=r"]).cube == ["a/b", "s3://c/d"]
    (tmp_path / "[a]").mkdir()
    assert cli.compose("train", ["cube=[a]", "run=r"]).cube == "[a]"


@pytest.mark.parametrize("word", ["model.trunk=null", "trunk=null", "lead_time=null"])
def test_what_is_none_already_may_be_said_to_be_none(word):
    assert cli.compose("train", ["cube=a", "run=r", word]) == cli.compose("train", ["cube=a", "run=r"])


def test_a_group_that_is_said_to_be_none_is_taken_away():
    words = ["cube=a", "run=r", "model.trunk=axial_image_transformer"]
    assert "strategy" in cli.compose("train", words)
    assert "strategy" not in cli.compose("train", [*words, "strategy=null"])
    with pytest.raises(cli.UsageError, match="train cannot do without model"):
        cli.compose("train", ["cube=a", "run=r", "model=null"])


FAULTS = """
import resource, cli
{told}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
for _ in range(20):
    held = b"x" * (3 * 2**24)
    del held
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="tells glibc's malloc")
def test_memory_that_was_freed_is_not_asked_for_again():
    asked, kept = (
        int(subprocess.check_output([sys.executable, "-c", FAULTS.format(told=told)], text=True, cwd=ROOT))
        for told in ("", "cli._keep_freed_memory()")
    )
    assert kept < asked / 3


def test_a_key_that_is_nearly_one_of_the_command_is_not_taken_for_one_of_a_group_alone(capsys):
    assert cli.answer("train", ["cube=x", "run=y", "lead_time=[5,10]"]) == 2
    assert "expected one of input; did you mean 'lead_times'?" in capsys.readouterr().err
