import math
import shutil
import subprocess
import sys

import pytest
from conftest import REPOSITORY, run_program
from hypothesis import given
from hypothesis import strategies as st

import benchmark
import evaluate
import prepare_data
import report
from config import CONFIG, RECIPES, SETTINGS
from engine.cli.command_line import FlagsParser, averaging_rate_in_words, key_comments, parse_command_line
from engine.cli.keys import ALLOWED, OTHER_RUN, ConfigError, config_problems
from engine.cli.resume_rule import RULED_ON_RESUME, resumed_config
from engine.run.published import POINTS


def problems_of(*arguments):
    with pytest.raises(ConfigError) as error:
        parse_command_line(arguments)
    return error.value.problems


def test_first_six_keys_are_the_seeds():
    assert list(CONFIG.items())[:6] == [
        ("batch_size", 256),
        ("learning_rate", 0.0005),
        ("epochs", 100),
        ("weight_decay", 1e-4),
        ("warmup_epochs", 10),
        ("grad_clip_value", 1.0),
    ]
    assert CONFIG["swa_start_epoch"] == 32


def test_every_key_has_a_comment_and_a_rule():
    assert list(key_comments()) == list(CONFIG) == list(ALLOWED)
    assert all(len(comment) > 5 for comment in key_comments().values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_is_a_sound_configuration(recipe):
    assert set(RECIPES[recipe]) <= set(CONFIG)
    assert config_problems(CONFIG | RECIPES[recipe]) == []


def test_flags_override_the_recipe_and_the_recipe_the_defaults():
    command = parse_command_line(["--recipe", "demo", "--epochs=9", "--weight_decay", "0.5", "--zero-init-residual", "false"])
    assert command.config["epochs"] == 9
    assert command.config["weight_decay"] == 0.5
    assert command.config["zero_init_residual"] is False
    assert command.config["data_dir"] == RECIPES["demo"]["data_dir"]
    assert command.config["momentum"] == CONFIG["momentum"]
    assert command.given == {"epochs": 9, "weight_decay": 0.5, "zero_init_residual": False}
    assert CONFIG["epochs"] == 100


@pytest.mark.parametrize("spelling", ["--learning-rate 0.001", "--learning_rate 0.001", "--learning-rate=1e-3"])
def test_hyphen_and_underscore_mean_the_same(spelling):
    assert parse_command_line(spelling.split()).config["learning_rate"] == 0.001


def test_learning_rate_and_workers_may_be_auto():
    config = parse_command_line(["--learning-rate", "auto", "--num-workers", "auto"]).config
    assert config["learning_rate"] == config["num_workers"] == "auto"


def test_grad_clip_value_may_be_infinite():
    assert math.isinf(parse_command_line(["--grad-clip-value", "inf"]).config["grad_clip_value"])


def test_all_problems_are_reported_at_once_with_range_and_nearest_key():
    problems = problems_of(
        "--learnin-rate", "3", "--batch-size", "0", "--optimizer", "adamax", "--epochs", "3.5", "stray", "--seed"
    )  # fmt: skip
    text = "\n".join(problems)
    assert len(problems) == 6
    assert "--learnin-rate: no such flag; did you mean --learning-rate?" in text
    assert "batch_size = 0: must be a whole number from 1" in text
    assert "optimizer = 'adamax': must be one of adamw, adam, sgd" in text
    assert "epochs = '3.5'" in text
    assert "stray" in text
    assert "--seed: a value is missing" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--epochs 5 --swa-start-epoch 0 --warmup-epochs 10", "warmup_epochs"),
        ("--epochs 20 --swa-start-epoch 32", "swa_start_epoch"),
        ("--checkpoint-dir s3://bucket/run", "must be a path on this machine"),
        ("--swa-start-epoch 10", "swa_start_epoch"),
        (
            "--epochs 10 --warmup-epochs 0.9 --swa-start-epoch 1",
            "warmup_epochs = 0.9; start the averaging with epoch 2 or later",
        ),
        ("--recipe mild --epochs 60 --swa-start-epoch 6", "warmup_epochs = 5.33333; start the averaging with epoch 7 or later"),
        ("--warmup-epochs 0 --swa-start-epoch 1 --swa-anneal-epochs 0", "learning_rate is never used"),
        ("--precision fp16 --device cpu", "fp16"),
        ("--micro-batch-size 512", "micro_batch_size"),
        ("--learning-rate nan", "learning_rate"),
        ("--seed -1", "from 0 to 4294967295"),
        ("--blur-pool --learning-rate", "--blur-pool: a value is missing; it must be true or false"),
        ("--learning-rate 0", "learning_rate"),
        ("--weight-decay -1", "weight_decay"),
        ("--zero-init-residual maybe", "zero_init_residual"),
        ("--data-dir=", "data_dir"),
        ("--recipe dmeo", "did you mean demo"),
        ("--train-resolution 33 --colout 0.05", "colout = 0.05: leaves 31 of 33 px"),
        ("--train-resolution 64 --start-resolution 32 --colout 0.01", "lower it, or raise start_resolution"),
    ],
)
def test_impossible_values_and_combinations_are_refused(arguments, named):
    assert named in "\n".join(problems_of(*arguments.split()))


@pytest.mark.parametrize(
    ("arguments", "processes", "refused"),
    [
        ("--batch-size 1 --train-resolution 32", 1, "batch_size = 1 at 32 px"),
        ("--batch-size 1 --train-resolution 33", 1, None),
        ("--batch-size 8 --micro-batch-size 1 --train-resolution 32", 1, "micro_batch_size = 1 at 32 px"),
        ("--batch-size 3 --micro-batch-size 2 --train-resolution 32", 1, "micro_batch_size = 2 at 32 px"),  # 2 and 1 images
        ("--batch-size 4 --micro-batch-size 2 --train-resolution 32", 1, None),
        ("--batch-size 1 --train-resolution 224 --start-resolution 32", 1, "batch_size = 1 at 32 px"),
        ("--batch-size 3 --train-resolution 32", 2, "batch_size = 3 at 32 px with 2 processes"),  # 2 and 1 images
        ("--batch-size 3 --train-resolution 32 --sync-batch-norm true", 2, None),
        ("--batch-size 1 --train-resolution 32 --sync-batch-norm true", 1, "batch_size = 1 at 32 px"),
        ("--batch-size 4 --train-resolution 32", 2, None),
        ("--batch-size 1 --train-resolution 64 --colout 0.5", 1, "batch_size = 1 at 32 px"),
        ("--batch-size 1 --train-resolution 66 --colout 0.5", 1, None),
        ("--batch-size 2 --train-resolution 64 --colout 0.5", 1, None),
    ],
)
def test_a_single_image_of_a_single_last_pixel_is_refused(arguments, processes, refused, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    if refused is None:
        assert parse_command_line(arguments.split()).config
    else:
        assert [problem.partition(":")[0] for problem in problems_of(*arguments.split())] == [refused]


@given(st.lists(st.sampled_from(["--epochs", "--seed", "3", "auto", "--", "--x", "-1", "=", "--recipe", "demo", "--seed=1e9"])))
def test_no_command_line_ends_in_anything_but_a_config_error(arguments):
    try:
        assert config_problems(parse_command_line(arguments).config) == []
    except ConfigError as error:
        assert error.problems


@given(st.sampled_from(list(CONFIG)), st.text(max_size=20))
def test_no_value_ends_in_anything_but_a_config_error(key, text):
    try:
        value = parse_command_line([f"--{key}={text}"]).config[key]
    except ConfigError:
        return
    assert ALLOWED[key].admits(value)


@pytest.mark.parametrize("program", ["train.py", "lr_finder.py"])
def test_a_wrong_command_line_exits_with_2_and_no_traceback(program):
    status, output = run_program(program, ["--epochs", "none", "--optimiser", "sgd"])
    assert status == 2
    assert "epochs = 'none'" in output
    assert "--optimizer?" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("parse", "words", "said"),
    [
        (evaluate.parse_arguments, "--resolutoin 96", "--resolutoin: no such flag; did you mean --resolution?"),
        (evaluate.parse_arguments, "best.pt --lr=3", "--lr: no such flag; --help lists them all"),
        (report.parse_arguments, "run --price 1", "--price: no such flag; did you mean --price-per-hour?"),
        (prepare_data.parse_arguments, "a b --qualty 80", "--qualty: no such flag; did you mean --quality?"),
        (prepare_data.parse_arguments, "a b c", "unrecognized arguments: c"),
        (benchmark.parse_arguments, "step --bach-size 8", "--bach-size: no such flag; did you mean --batch-size?"),
    ],
)
def test_a_mistyped_flag_of_the_other_programs_is_answered_with_the_nearest(parse, words, said, capsys):
    with pytest.raises(SystemExit) as end:
        parse(words.split())
    assert end.value.code == 2
    assert capsys.readouterr().err.endswith(f"error: {said}\n")


def gives_nan(words):
    parser = FlagsParser("program")
    parser.add_argument("--number", type=float)
    parser.parse_args(words)


@pytest.mark.parametrize(
    ("parse", "words", "said"),
    [
        (parse_command_line, "--epochs 3 --epochs=5", "train.py: note: --epochs is given more than once: 5 counts\n"),
        (
            evaluate.parse_arguments,
            "--resolution 96 --resolution 64 72",
            "--resolution is given more than once: 64 72 counts\n",
        ),
        (benchmark.parse_arguments, "step --rounds 1 --rounds 2", "note: --rounds is given more than once: 2 counts\n"),
        (parse_command_line, "--epochs 3 --epochs=3", ""),
        (evaluate.parse_arguments, "a.pt b.pt --flip --flip --crop-ratio 0.5", ""),
        (gives_nan, "--number nan", ""),
    ],
)
def test_of_a_flag_that_is_given_twice_the_value_that_counts_is_said(parse, words, said, capsys):
    parse(words.split())
    errors = capsys.readouterr().err
    assert errors.endswith(said) and bool(errors) == bool(said)


@pytest.mark.parametrize("program", ["train.py", "lr_finder.py"])
def test_help_lists_every_key_with_its_comment_and_needs_no_torch(program, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    status, output = run_program(program, ["--help"], environment={"PYTHONPATH": str(tmp_path)})
    assert status == 0
    for key, comment in key_comments().items():
        assert f"--{key.replace('_', '-')} " in output
        assert comment in output


@pytest.fixture
def edited(tmp_path):
    """Return a function that edits config.py of a copy of the programs and gives (status, output) of its train.py."""
    for name in ("train.py", "engine/__init__.py", *(f"engine/{room}/*.py" for room in ("cli", "system"))):
        for file in REPOSITORY.glob(name):
            (tmp_path / file.relative_to(REPOSITORY)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, tmp_path / file.relative_to(REPOSITORY))

    def edit(old, new, *arguments):
        text = (REPOSITORY / "config.py").read_text()
        assert old in text
        (tmp_path / "config.py").write_text(text.replace(old, new, 1))
        command = [sys.executable, tmp_path / "train.py", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    return edit


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"learning_rate": 0.0005,', '"lerning_rate": 0.0005,', "lerning_rate: no such key; did you mean learning_rate?"),
        ('"learning_rate": 0.0005,', '"lerning_rate": 0.0005,', "config.py: learning_rate is missing"),
        ('    "seed": 0,', '    "my_key": 3,\n    "seed": 0,', "my_key: no such key; one of your own needs a line in ALLOWED"),
        ('"epochs": 29,', '"epoch": 29,', "config.py, recipe mild: epoch: no such key; did you mean epochs?"),
    ],
)
def test_a_key_that_config_py_should_not_have_or_lacks_is_named_at_each_start(edited, old, new, said):
    status, output = edited(old, new, "--epochs", "none")
    assert status == 2
    assert said in output
    assert "Traceback" not in output


def test_a_key_is_a_flag_whatever_its_line_in_config_py_looks_like(edited):
    edits = '"batch_size": 64, # my GPU is small\n    "learning_rate": 0.1,\n    "epochs": (\n  50\n    ),\n    "weight_decay"'
    before = (REPOSITORY / "config.py").read_text()
    status, output = edited(before[before.index('"batch_size"') : before.index(": 1e-4")], edits, "--help")
    assert status == 0
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert {"--batch-size [64] my GPU is small", "--learning-rate [0.1]", "--epochs [50]"} <= set(lines)


@pytest.mark.parametrize(
    ("flag", "hint"),
    [("--lr", "--learning-rate"), ("--wd", "--weight-decay"), ("--model", "--architecture"), ("--num-classes", "--data-dir")],
)
def test_other_programs_names_of_a_flag_are_understood(flag, hint):
    (problem,) = problems_of(flag, "3")
    assert problem.startswith(f"{flag}: no such flag; ") and hint in problem


# The resume rule -----------------------------------------------------------------------------------------------------


def test_each_key_is_free_ruled_or_refused_on_resume():
    free, ruled = set(SETTINGS), set(RULED_ON_RESUME)
    refused = {key for key, kind in ALLOWED.items() if getattr(kind, "kept", OTHER_RUN) != OTHER_RUN}
    assert free | ruled | refused <= set(CONFIG)
    assert not free & ruled
    assert not (free | ruled) & refused


@pytest.mark.parametrize("key", [key for key in CONFIG if key not in SETTINGS and key not in RULED_ON_RESUME])
def test_a_flag_that_would_bend_the_run_is_refused_on_resume_with_the_reason(key):
    other = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 0.5 + 0.1, str: lambda v: v + "x"}
    changed = other[type(CONFIG[key])](CONFIG[key])
    with pytest.raises(ConfigError) as error:
        resumed_config(CONFIG, {key: changed}, batch=0)
    assert f"{key} = {changed!r}" in error.value.problems[0]
    assert ALLOWED[key].kept in error.value.problems[0]
    assert resumed_config(CONFIG, {key: CONFIG[key]}, batch=0) == CONFIG


@pytest.mark.parametrize("key", SETTINGS)
def test_a_flag_that_cannot_bend_the_run_may_change_on_resume(key):
    others = {"more_val_resolutions": [256], "num_workers": 3, "device": "cpu", "precision": "bf16", "micro_batch_size": 2}
    value = others.get(key, CONFIG[key])
    assert resumed_config(CONFIG, {key: value}, batch=5)[key] == value


def test_epochs_may_change_on_resume_and_batch_size_only_between_epochs():
    assert resumed_config(CONFIG, {"epochs": 120}, batch=7)["epochs"] == 120
    assert resumed_config(CONFIG, {"batch_size": 128}, batch=0)["batch_size"] == 128
    with pytest.raises(ConfigError, match="only between epochs"):
        resumed_config(CONFIG, {"batch_size": 128}, batch=7)


def test_a_run_that_was_begun_as_no_run_can_begin_now_may_go_on():
    saved = CONFIG | {"epochs": 3, "warmup_epochs": 0, "swa_start_epoch": 1, "swa_anneal_epochs": 0}
    assert config_problems(saved) and resumed_config(saved, {"epochs": 9}, batch=2)["epochs"] == 9
    with pytest.raises(ConfigError, match="micro_batch_size = 512"):
        resumed_config(saved, {"micro_batch_size": 512}, batch=2)


def problems_on_resume(done, batch=0, **changes):
    """Of the seed's run, which warms up for 10 epochs and averages from the 32nd on, resumed after `done` epochs."""
    try:
        return [] if resumed_config(CONFIG, changes, batch, done) == CONFIG | changes else ["not as asked for"]
    except ConfigError as error:
        return error.problems


@pytest.mark.parametrize("batch", [0, 7])
def test_a_run_that_does_not_average_yet_can_be_ended_earlier(batch):
    (advice,) = problems_on_resume(5, batch, epochs=20)
    assert "lower it, or set it to 0" in advice
    assert problems_on_resume(5, batch, epochs=20, swa_start_epoch=0) == []
    assert problems_on_resume(12, batch, epochs=20, swa_start_epoch=14) == []
    assert problems_on_resume(30, batch, swa_start_epoch=90) == []
    (advice,) = problems_on_resume(5, batch, epochs=8, swa_start_epoch=0)
    assert "warmup_epochs = 10" in advice and "give at least 10" in advice
    assert problems_on_resume(5, batch, epochs=10, swa_start_epoch=0) == []


def test_when_averaging_begins_may_change_only_where_it_moves_no_step_that_is_done():
    assert "start later than epoch 12, or" in problems_on_resume(12, 0, swa_start_epoch=12)[0]
    assert problems_on_resume(12, 0, swa_start_epoch=13) == []
    assert "start later than epoch 13, or" in problems_on_resume(12, 1, swa_start_epoch=13)[0]  # in its passage
    assert problems_on_resume(31, 0, epochs=31, swa_start_epoch=0) == []
    for done, batch in ((31, 1), (32, 0), (60, 3)):
        assert "averages since epoch 32" in problems_on_resume(done, batch, swa_start_epoch=0)[0]
        assert problems_on_resume(done, batch, epochs=done + 1, swa_start_epoch=32) == []
    never = CONFIG | {"swa_start_epoch": 0}
    assert resumed_config(never, {"swa_start_epoch": 80}, 3, 70) == CONFIG | {"swa_start_epoch": 80}
    with pytest.raises(ConfigError, match="start later than epoch 71"):
        resumed_config(never, {"swa_start_epoch": 71}, 3, 70)


def test_learning_rate_auto_keeps_the_rate_that_was_found():
    saved = CONFIG | {"learning_rate": 0.0031}
    assert resumed_config(saved, {"learning_rate": "auto"}, batch=0)["learning_rate"] == 0.0031


def test_keys_that_an_older_checkpoint_does_not_know_get_their_defaults():
    saved = {key: value for key, value in CONFIG.items() if key != "label_smoothing"} | {"a_key_of_old": 1}
    assert resumed_config(saved, {}, batch=0) == CONFIG


@pytest.mark.parametrize(
    ("arguments", "durations"),
    [
        ("", (10, 32, 5)),
        ("--epochs 20", (2, 6, 1)),
        ("--epochs 200", (20, 64, 10)),
        ("--epochs 1", (0.1, 0, 0)),  # a part of an epoch, before it would be none; a single epoch's weights are no average
        ("--epochs 2", (0.2, 0, 0)),
        ("--epochs 3", (0.3, 2, 0)),
        ("--epochs 4", (0.4, 2, 0)),
        ("--epochs 5", (1, 2, 0)),
        ("--epochs 20 --warmup-epochs 2.5", (2.5, 6, 1)),
        ("--epochs 20 --warmup-epochs 6.5", (6.5, 8, 1)),
        ("--epochs 20 --warmup-epochs 20", (20, 0, 1)),
        ("--epochs 20 --warmup-epochs 7", (7, 8, 1)),  # averaging never begins while the rate rises
        ("--epochs 50 --swa-start-epoch 40", (5, 40, 5)),
        ("--epochs 50 --swa-anneal-epochs 3", (5, 32, 3)),
        ("--epochs 30 --swa-start-epoch 0", (3, 0, 5)),
        ("--recipe fast --epochs 40", (2, 0, 5)),  # FFCV's warm-up takes 2 epochs at any length
        ("--recipe fast --epochs 12", (1.5, 0, 5)),  # of those that are published; a shorter run keeps the shortest one's share
        ("--recipe fast --epochs 1", (0.125, 0, 5)),
        ("--recipe long --epochs 40", (2, 0, 5)),
        ("--recipe long --epochs 2", (0.25, 0, 5)),
        ("--recipe long --epochs 2 --warmup-epochs 2", (2, 0, 5)),
        ("--recipe demo --epochs 1", (0.125, 0, 0)),
        ("--recipe demo --epochs 4", (1, 3, 1)),
    ],
)
def test_warm_up_and_averaging_follow_the_length_unless_they_are_given(arguments, durations):
    config = parse_command_line(arguments.split()).config
    assert tuple(config[key] for key in ("warmup_epochs", "swa_start_epoch", "swa_anneal_epochs")) == durations


@pytest.mark.parametrize(
    ("arguments", "rate", "said"),
    [
        ("", 0.00025, False),
        ("--learning-rate 0.0005", 0.00025, False),
        ("--optimizer sgd --learning-rate 0.1", 0.05, True),
        ("--learning-rate 0.0001 --scale-learning-rate true --epochs 20", 0.00005, True),
        ("--learning-rate 0.1 --swa-learning-rate 0.02", 0.02, False),
        ("--learning-rate 0.1 --swa-learning-rate 0", 0, False),
        ("--learning-rate auto", 0.00025, False),  # until it is found
        ("--learning-rate 0.1 --swa-start-epoch 0", 0.00025, False),
        ("--recipe demo --learning-rate 0.01", 0.003, True),
        ("--recipe fast", 0.00025, False),  # averages nothing
        ("--recipe fast --swa-start-epoch 12", 0.10625 / 2, True),  # no recipe with SGD has a share of its own
    ],
)
def test_the_averaging_rate_keeps_its_share_of_the_peak_unless_it_is_given(arguments, rate, said):
    command = parse_command_line(arguments.split())
    assert command.config["swa_learning_rate"] == pytest.approx(rate)
    lines = averaging_rate_in_words(command.config, command.recipe, command.given)
    assert [f"swa_learning_rate = {rate:g} (was " in line for line in lines] == [True] * said
    assert resumed_config(CONFIG | {"learning_rate": 0.1}, {}, batch=0)["swa_learning_rate"] == 0.00025  # of an older version


@pytest.mark.parametrize("epochs", range(1, 120))
def test_every_length_of_the_default_recipe_can_be_trained(epochs):
    assert parse_command_line([f"--epochs={epochs}"]).config["epochs"] == epochs


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_length_of_every_recipe_can_be_trained_and_published_ones_are_untouched(recipe):
    command = parse_command_line([f"--recipe={recipe}"])
    assert command.config == CONFIG | RECIPES[recipe]
    for epochs in range(1, 300):
        assert config_problems(command.config | command.durations(epochs)) == []
        if recipe in ("fast", "long") and epochs in POINTS[recipe]:
            assert command.config | command.durations(epochs) == CONFIG | RECIPES[recipe] | {"epochs": epochs}


def test_a_home_folder_in_a_path_is_found(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    command = parse_command_line(["--data-dir=~/images", "--resume=~/runs/last.pt"], ["resume FILE"])
    assert command.config["data_dir"] == "/home/somebody/images"
    assert command.options["resume"] == "/home/somebody/runs/last.pt"
    with pytest.raises(ConfigError, match="gs://bucket/run/last.pt: must be a path on this machine"):
        parse_command_line(["--resume=gs://bucket/run/last.pt"], ["resume FILE"])


@pytest.mark.parametrize(
    "typed", ["s3:/bucket/run", "s3:bucket/run", "S3://bucket/run", "gs:/b", "https://b.s3.amazonaws.com/run"]
)
def test_a_mistyped_address_is_no_folder(typed):
    for flag in ("mirror", "data-dir", "checkpoint-dir", "local-data-dir", "log-file"):
        assert "must be" in problems_of(f"--{flag}={typed}")[0]
    with pytest.raises(ConfigError, match="must be a path on this machine"):
        parse_command_line([f"--resume={typed}"], ["resume FILE"])


def test_a_deterministic_run_cannot_be_compiled():
    assert "compile = 'on'" in problems_of("--deterministic=true", "--compile=on")[0]
    for compile in ("auto", "off"):
        assert parse_command_line(["--deterministic=true", f"--compile={compile}"]).config["deterministic"] is True
