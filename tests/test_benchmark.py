"""What the README says of speed is what was measured and kept."""

from conftest import REPOSITORY, run_program

from benchmarks.input_speed import input_tables, read_originals
from benchmarks.measuring import recorded

BEGIN = "<!-- input benchmark: written by PYTHONPATH=. python tests/test_benchmark.py -->"
END = "<!-- end of input benchmark -->"
README = REPOSITORY / "README.md"


def measured_table():
    return "\n".join(input_tables(recorded("input")[-1]))


def test_the_readmes_table_of_input_speed_is_the_newest_measurement():
    table = README.read_text().split(BEGIN)[1].split(END)[0].strip()
    assert table == measured_table(), "run PYTHONPATH=. python tests/test_benchmark.py"


def test_the_input_benchmark_measures_every_contender_on_real_files(tmp_path):
    flags = ["input", "--images=8", "--rounds=1", "--resolutions", "64", "--num-workers=1", "--loader-batches=1", "--no-record"]
    status, output = run_program("benchmark.py", flags, cwd=tmp_path)
    assert status == 0, output
    for name in ("torchvision", "ours, originals", "ours, packed", "decode alone, packed", "no loader, originals"):
        assert f"| {name} | " in output
    assert "1.00x" in output


def test_made_originals_resemble_imagenets_in_pixels_and_bytes():
    contents = read_originals(None, 20)
    assert 90_000 < sum(map(len, contents)) / 20 < 130_000  # ImageNet's mean is about 110 kB


if __name__ == "__main__":
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n\n{measured_table()}\n\n{END}{rest.split(END)[1]}")
