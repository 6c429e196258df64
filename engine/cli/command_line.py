"""From the words of a command line to a Command: the configuration of a new run, and what else the program was asked for.

Needs nothing but the standard library, so that --help and typing errors answer before torch is imported.
"""

import argparse
import ast
import difflib
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from config import CONFIG, RECIPES
from engine.cli.keys import ALLOWED, ConfigError, LocalPath, config_problems, value_problems
from engine.system.console import protect_output
from engine.system.errors import launched_rank

TOP = Path(__file__).resolve().parents[2]  # where config.py and the programs lie
PATH_FLAGS = ("resume", "output")  # the programs' own flags that name a place
WEIGHTS_HINT = "; weights to begin with: --initial-weights FILE, or torchvision:IMAGENET1K_V2"
SIZE_HINT = "; the sizes are --train-resolution and --val-resolution"
OTHERS_NAMES = {  # what other programs call it: what to say
    "--pretrained": WEIGHTS_HINT,
    "--weights": WEIGHTS_HINT,
    "--lr": "; did you mean --learning-rate?",
    "--wd": "; did you mean --weight-decay?",
    "--model": "; did you mean --architecture?",
    "--arch": "; did you mean --architecture?",
    "--amp": "; did you mean --precision?",
    "--output-dir": "; did you mean --checkpoint-dir?",
    "--auto-augment": "; did you mean --augmentation?",
    "--img-size": SIZE_HINT,
    "--image-size": SIZE_HINT,
    "--num-classes": "; the classes are the class folders in --data-dir",
    "--gpus": "; several GPUs: torchrun --nproc_per_node=N train.py",
    "--evaluate": "; scores: python evaluate.py CHECKPOINT",
}
MISSING = object()  # in place of a flag's value


class Command(NamedTuple):
    """What a command line asks for."""

    config: dict  # of a new run
    given: dict  # only the keys that flags name: what a resumed run is checked against
    recipe: str | None  # as named on the command line; None means the default, seed
    options: dict  # the program's own flags, such as resume

    def with_recipe(self, recipe):
        """Return the Command with another recipe, whose values the given keys override."""
        config = stretched(CONFIG | RECIPES[recipe], recipe, self.given)
        return self._replace(config=config, recipe=recipe)

    def durations(self, epochs, usual=None):
        """Return {key: value} of what the length of a new run decides: what is not given keeps its share of it.

        Args:
            usual: configuration whose shares these are, in place of the recipe's.
        """
        usual = usual or CONFIG | RECIPES.get(self.recipe, {})
        config = stretched(usual, self.recipe, self.given | {"epochs": epochs})
        return {key: config[key] for key in ("epochs", *DURATIONS)}


# A published schedule that says otherwise: FFCV's warm-up takes 2 epochs at any length, of which 16 is the shortest.
WARMUP_OF_ANY_LENGTH, SHORTEST = ("fast", "long"), RECIPES["fast"]
DURATIONS = ("warmup_epochs", "swa_start_epoch", "swa_anneal_epochs")


def stretched(recipe_config, recipe, given):
    """Return a recipe's configuration with the given keys; where they change `epochs`, other durations keep their share.

    These are the DURATIONS, unless one of their kind is given; in whole epochs where the recipe averages those, but for a
    warm-up that would be none. Averaging begins when the rate has reached its peak, and not at all for one epoch's weights.
    """
    config = with_averaging_rate(recipe_config | given, recipe, given)
    epochs, usual = config["epochs"], recipe_config["epochs"]
    if not ALLOWED["epochs"].admits(epochs) or epochs == usual:
        return config

    def share(key):
        exact = recipe_config[key] * epochs / usual
        return int(exact + 0.5) if recipe_config["swa_start_epoch"] else exact

    if "warmup_epochs" not in given and recipe in WARMUP_OF_ANY_LENGTH:
        config["warmup_epochs"] = min(config["warmup_epochs"], SHORTEST["warmup_epochs"] * epochs / SHORTEST["epochs"])
    elif "warmup_epochs" not in given:
        config["warmup_epochs"] = share("warmup_epochs") or recipe_config["warmup_epochs"] * epochs / usual
    if config["swa_start_epoch"] and not {"swa_start_epoch", "swa_anneal_epochs"} & set(given):
        warmup = config["warmup_epochs"] if ALLOWED["warmup_epochs"].admits(config["warmup_epochs"]) else 0
        start = max(share("swa_start_epoch"), math.ceil(warmup) + 1, 2)
        config["swa_start_epoch"] = start if start < epochs else 0
        config["swa_anneal_epochs"] = share("swa_anneal_epochs")
    return config


def with_averaging_rate(config, recipe, given):
    """Return a new run's configuration whose swa_learning_rate, unless it is given, keeps its share of learning_rate.

    The share is the recipe's, or where a recipe has no swa_learning_rate of its own, that of the defaults.
    """
    usual, rate = usual_rates(recipe), config["learning_rate"]
    known = rate != "auto" and ALLOWED["learning_rate"].admits(rate)
    if not known or not config["swa_start_epoch"] or "swa_learning_rate" in given:
        return config
    if rate == usual["learning_rate"]:
        return config | {"swa_learning_rate": usual["swa_learning_rate"]}
    return config | {"swa_learning_rate": rate * (usual["swa_learning_rate"] / usual["learning_rate"])}


def usual_rates(recipe):
    """Return the configuration whose learning_rate and swa_learning_rate belong together in a recipe."""
    own = RECIPES.get(recipe, {})
    return CONFIG | (own if "swa_learning_rate" in own else {})


def averaging_rate_in_words(config, recipe, given):
    """Return [a sentence about what `with_averaging_rate` has changed], or [] where it has changed nothing."""
    rate, was = config["swa_learning_rate"], usual_rates(recipe)["swa_learning_rate"]
    if "swa_learning_rate" in given or not config["swa_start_epoch"] or rate == was:
        return []
    peak = config["learning_rate"]
    return [f"learning_rate = {peak:g}: swa_learning_rate = {rate:g} (was {was:g}) follows; a flag sets it otherwise"]


def stretching_in_words(recipe, config, given):
    """Return a sentence about what `stretched` has changed beside the epochs, or None; a size_rule says more on the warm-up."""
    usual, by_rule = CONFIG | RECIPES.get(recipe, {}), {"warmup_epochs"} if config["size_rule"] != "none" else set()
    changed = [key for key in DURATIONS if key not in given and key not in by_rule and config[key] != usual[key]]
    if not changed:
        return None
    shown = ", ".join(f"{key} = {config[key]:g} (was {usual[key]:g})" for key in changed)
    return f"epochs = {config['epochs']} (the recipe's are {usual['epochs']}): {shown} follow; flags set them otherwise"


TASKS = ("plan", "check", "preview")  # that take the place of a run


def require_one_task(command):
    """Raise ConfigError where a Command asks train.py for two things at once, or for one of these about a run to resume."""
    asked = [name for name in TASKS if name in command.options]
    if len(asked) > 1:
        raise ConfigError([f"--{' and --'.join(asked)}: one at a time"])
    if "resume" in command.options and {"check", "preview"} & set(asked):
        raise ConfigError([f"--{asked[0]} with --resume: it looks at a new run; name its recipe and flags"])


# Flags ---------------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse's parser, which says which value counts of a flag that is given more than once."""

    def __init__(self, prog, **options):
        super().__init__(prog, **{"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False} | options)
        self.register("action", None, _LastValue)
        self.values = {}  # of the flags so far


class _LastValue(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        repeated = self.dest in parser.values and parser.values[self.dest] != values
        parser.values[self.dest] = values
        if option_string and repeated and launched_rank() == 0:
            shown = " ".join(map(str, values)) if isinstance(values, list) else values
            print(f"{parser.prog}: note: {option_string} is given more than once: {shown} counts", file=sys.stderr)
        setattr(namespace, self.dest, values)


class KeysParser(Parser):
    """A Parser that raises ConfigError where argparse ends the program at the first problem."""

    def error(self, message):
        raise ConfigError([message])


class FlagsParser(Parser):
    """A Parser of a program whose flags are not the configuration's keys; a mistyped one is answered with the nearest."""

    def parse_known_args(self, args=None, namespace=None):
        """Return (namespace, []), or end the program where a word is left over."""
        parsed, left_over = super().parse_known_args(args, namespace)
        if left_over and not left_over[0].startswith("-"):
            self.error(f"unrecognized arguments: {' '.join(left_over)}")
        if left_over:
            known = [flag[2:].replace("-", "_") for flag in self._option_string_actions if flag.startswith("--")]
            self.error("; ".join(unknown_flags(left_over, known, {})))
        return parsed, left_over


def flag_of(key):
    """Return the flag of a key."""
    return "--" + key.replace("_", "-")


def key_comments():
    """Return {key: the comment beside it in config.py}; the comment is the key's help."""
    source = (TOP / "config.py").read_text(encoding="utf-8")
    source = source[source.index("\nHYPERPARAMETERS = {") : source.index("\nCONFIG = ")]
    return dict(re.findall(r'^    "(\w+)": .*?, *# *(.*)$', source, flags=re.MULTILINE))


def build_parser(program, usage, own_flags, for_help=False):
    """Return the Parser of a program: its own flags, --recipe, and a flag for each key. A flag without its value is MISSING.

    Args:
        usage: text of the help; None takes the program's docstring, which `python -OO` leaves out at run time.
        own_flags: {flag: help}; 'resume FILE' takes a value, 'preview [N]' one or none (then it is ''), 'overwrite' none.
    """
    if usage is None:
        usage = ast.get_docstring(ast.parse((TOP / program).read_text(encoding="utf-8")))
    formatter = lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=31, width=1000)  # noqa: E731
    options = {"add_help": False, "argument_default": argparse.SUPPRESS, "usage": argparse.SUPPRESS}
    parser = KeysParser(program, description=usage.strip(), formatter_class=formatter, **options)
    optional = {} if for_help else {"nargs": "?", "const": MISSING}
    group = parser.add_argument_group("options")
    for flag, text in (own_flags | {"recipe NAME": f"{', '.join(RECIPES)}; named overrides of the defaults below"}).items():
        name, _, value = flag.partition(" ")
        takes = {"metavar": value} | optional if value else {"action": "store_true"}
        if value.startswith("["):
            takes = {"metavar": value.strip("[]"), "nargs": "?", "const": ""}
        group.add_argument(f"--{name}", dest=name.replace("-", "_"), help=text, **takes)
    group = parser.add_argument_group(f"configuration ({program} --key value; defaults of the seed recipe in brackets)")
    comments = key_comments()
    for key, default in CONFIG.items():
        text = f"[{default}] {comments.get(key, '')}".replace("%", "%%")
        group.add_argument(flag_of(key), dest=key, metavar="", help=text, **optional)
    return parser


def parse_command_line(arguments, own_flags=(), program="train.py"):
    """Return the Command that the arguments ask for.

    Args:
        arguments: list of str, without the program's name.
        own_flags: as for build_parser.
    Raises:
        ConfigError: with every problem found, not just the first.
    """
    if problems := problems_of_keys():
        raise ConfigError(problems)
    words = [re.sub(r"^--[\w-]+", lambda flag: flag[0].replace("_", "-"), word) for word in arguments]  # both are understood
    parsed, left_over = build_parser(program, "", dict.fromkeys(own_flags, "")).parse_known_args(words)
    known = ["recipe", *(flag.partition(" ")[0].replace("-", "_") for flag in own_flags), *CONFIG]
    values = vars(parsed)
    problems = unknown_flags(left_over, known)
    problems += [
        f"{flag_of(name)}: a value is missing" + (f"; it must be {ALLOWED[name].describe()}" if name in ALLOWED else "")
        for name, value in values.items()
        if value is MISSING
    ]
    values = {name: value for name, value in values.items() if value is not MISSING}
    recipe = values.pop("recipe", None)
    flags = {key: ALLOWED[key].read(text) for key, text in values.items() if key in CONFIG}
    options = {name: value for name, value in values.items() if name not in CONFIG}
    if recipe is not None and recipe not in RECIPES:
        problems.append(f"--recipe {recipe}: there are {', '.join(RECIPES)}{nearest(recipe, RECIPES, '; did you mean {}?')}")
    for name in options.keys() & PATH_FLAGS:
        text, options[name] = options[name], LocalPath().read(options[name])
        if not LocalPath().admits(text):
            problems.append(f"--{name} {text}: must be {LocalPath().describe()}")
    config = stretched(CONFIG | RECIPES.get(recipe, {}), recipe, flags)
    # with --resume the flags join the checkpoint's configuration, and only that can tell whether they go together
    problems += value_problems(config) if "resume" in options else config_problems(config)
    if problems:
        raise ConfigError(problems)
    return Command(config, flags, recipe, options)


def problems_of_keys():
    """Return a line for each key that config.py, or a recipe in it, should not have, or lacks."""
    own = "; one of your own needs a line in ALLOWED of engine/cli/keys.py"
    places = {"config.py": CONFIG} | {f"config.py, recipe {name}": recipe for name, recipe in RECIPES.items()}
    return [
        f"{place}: {key}: no such key{nearest(key, ALLOWED, '; did you mean {}?', joint='_') or own}"
        for place, keys in places.items()
        for key in keys
        if key not in ALLOWED
    ] + [f"config.py: {key} is missing" for key in ALLOWED if key not in CONFIG]


def unknown_flags(words, known, others_names=OTHERS_NAMES):
    """Return the problems of the words that no flag has taken, each with the nearest flag."""
    problems, words = [], list(words)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            problems.append(f"{word}: not a flag; flags look like --learning-rate 0.001")
            continue
        name, equals, _ = word.partition("=")
        hint = others_names.get(name) or nearest(name[2:].replace("-", "_"), known, "; did you mean --{}?", cutoff=0.5)
        hint = hint or "; --help lists them all"
        problems.append(f"{name}: no such flag{hint}")
        if words and not equals and not words[0].startswith("--"):
            words.pop(0)  # its value, which would only be a second complaint
    return problems


def nearest(word, known, text, cutoff=0.6, joint="-"):
    """Return the text with the known word that is nearest to a word, or '' if none is near; its parts joined as in flags."""
    found = difflib.get_close_matches(word, known, n=1, cutoff=cutoff)
    return text.format(found[0].replace("_", joint)) if found else ""


def command_from_terminal(program, usage, own_flags):
    """Return the Command of this process, or leave it: with the help (exit 0), or with all problems (exit 2)."""
    protect_output()
    arguments = sys.argv[1:]
    is_first = launched_rank() == 0  # of the processes that torchrun has started with the same command line
    if "--help" in arguments or "-h" in arguments:
        if is_first:
            print(build_parser(program, usage, own_flags, for_help=True).format_help())
        sys.exit(0)
    try:
        return parse_command_line(arguments, own_flags, program)
    except ConfigError as error:
        if is_first:
            print("\n".join(f"{program}: {problem}" for problem in error.problems), file=sys.stderr)
        sys.exit(2)
