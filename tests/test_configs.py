"""Every YAML is a call that can be made."""

import inspect
import re
import shlex
from functools import partial

import pytest
from hydra.utils import get_method, get_object, instantiate

import cli
from metnet.model import MetNet

GROUPS = (
    "attention",
    "baseline",
    "grid",
    "head",
    "lead_time",
    "loss",
    "model",
    "source",
    "strategy",
    "trunk",
)
SOURCES = cli.CONFIGS / "source"
NEEDS_PATH = {path.stem for path in SOURCES.glob("*.yaml") if "path: ???" in path.read_text()} | {
    "from_path",
    "pretrained",  # and its weights: tests/pipelines/test_pretrained.py
}


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "demo"])
def test_a_commands_keys_are_its_functions_arguments(command):
    required = [
        key.name for key in cli.read_page(cli.CONFIGS / f"{command}.yaml").keys if key.default == "required"
    ]
    config = cli.compose(command, [f"{key}=x" for key in required])
    arguments = inspect.signature(get_method(config["_target_"])).parameters
    assert set(config) - {"_target_"} <= set(arguments)
    missing = {
        name
        for name, argument in arguments.items()
        if argument.default is argument.empty and name not in config and name != "config"
    }
    assert missing == set()


@pytest.mark.parametrize(
    "name", [f"{group}/{name}" for group in GROUPS for name in cli.options(group) if name not in NEEDS_PATH]
)
def test_every_member_of_a_group_builds(name):
    import hydra

    with hydra.initialize_config_dir(str(cli.CONFIGS), version_base="1.3"):
        config = hydra.compose(name)
    node = config
    for part in name.split("/")[:-1]:
        node = node[part]
    built, target = instantiate(node), get_object(node["_target_"])
    if isinstance(built, partial):
        assert built.func is target
    elif isinstance(target, type):
        assert isinstance(built, target)
    else:
        assert name in ("grid/native", "loss/by_head", "strategy/alone")
        assert built is None


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_an_example_can_be_pasted_into_any_shell_and_is_a_call(command):
    for example in cli.read_page(cli.CONFIGS / f"{command}.yaml").examples:
        unquoted = re.sub(r"'[^']*'", "", example)
        assert not set(unquoted) & set('[]{}()*?<>|&;$!#"\\`'), f"zsh takes it for its own: {example}"
        name, asked, *words = shlex.split(example)
        assert (name, asked in cli.COMMANDS) == ("metnet", True)
        cli.compose(asked, words)


def test_an_example_of_a_rollback_cannot_be_taken_at_its_word():
    [example] = [line for line in cli.read_page(cli.CONFIGS / "rollback.yaml").examples if "rollback" in line]
    assert example.endswith(" snapshot=ID_FROM_INSPECT")


def test_the_help_of_train_tells_what_a_network_may_see():
    told = cli.read_page(cli.CONFIGS / "train.yaml").text
    for key in ("satellite", "satellite_frames", "static", "position", "surroundings"):
        assert key in inspect.signature(MetNet).parameters
        [word] = re.findall(rf"\+model\.{key}=[^\s';]+", told)
        assert key in cli.compose("train", ["cube=x", "run=y", word.rstrip(",")]).model


def test_what_a_training_is_made_of_can_be_chosen_in_front_of_a_whole_recipe():
    words = ["data=x", "out=y", "training.loss=crps", "training.model.attention=criss_cross"]
    training = cli.compose("bench-skill", words).training
    assert training.loss._target_ == "metnet.loss.crps"
    assert training.model.attention._target_ == "metnet.attention.criss_cross.CrissCrossAttention"
    assert training.model.stochastic_depth == 0.5, "as the recipe has it"
    with pytest.raises(cli.UsageError, match=r"training\.loss=crsp: expected one of .*did you mean 'crps'"):
        cli.compose("bench-skill", ["data=x", "out=y", "training.loss=crsp"])
