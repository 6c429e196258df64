"""A sitting at a GPU as tables: what `python benchmark.py gpu` prints, and the docs show."""

from benchmarks.gpu_sitting import newest_results


def gpu_tables(sitting):
    """Return a sitting as lines of Markdown: a block to paste as a report of a card."""
    if not sitting:
        return ["nothing was measured"]
    last, results = sitting[-1], newest_results(sitting)
    commits = {str(line["commit"]) for line in {line["part"]: line for line in sitting}.values()}
    failed = {part: result["failed"] for part, result in results.items() if "failed" in result}
    results = {part: result for part, result in results.items() if part not in failed}
    lines = [
        f"{'REHEARSAL at a tiny size, no figures: ' if last['rehearsal'] else ''}{last['card']}, driver {last['driver']}, "
        f"{last['cpu']}, {last['cores']} cores, PyTorch {last['versions']['torch']}, cuDNN {last['cudnn']}, "
        f"{last['precision']}, commit {', '.join(sorted(commits))}, {last['date']}; n = 1.",
        "",
    ]
    if "gpu tests" in results:
        counts, bad = results["gpu tests"]["counts"], results["gpu tests"]["not_passed"]
        lines += ["GPU tests: " + ", ".join(f"{count} {name}" for name, count in counts.items()) + ".", *bad, ""]
    lines += [*_step_lines(results), *_largest_batch_lines(results), *_run_lines(results), *_recipe_lines(results)]
    lines += [f"Failed: {part}: {why}" for part, why in failed.items()]
    return lines[:-1] if lines[-1] == "" else lines


def _largest_batch_lines(results):
    largest = {part.split("memory ")[1]: result for part, result in results.items() if part.startswith("longest batch")}
    if not largest:
        return []
    why = {memory: result["stopped_by"].split(". ")[0] for memory, result in largest.items()}  # CUDA's messages go on and on
    text = "; ".join(f"`{memory}` {result['images']:,} ({why[memory]})" for memory, result in largest.items())
    px = next(iter(largest.values()))["resolution"]
    return [f"Longest batch that fits at {px} px, by --memory: {text}.", ""]


def _run_lines(results):
    """Return the lines on whole runs of train.py: end to end, and a second start."""
    lines = []
    if train := results.get("end to end"):
        rates = train["rates"]
        lines += [
            f"End to end from packed JPEGs at {train['resolution']} px: {rates['training'][0]:,.0f} images/s, the step alone "
            f"{rates['step'][0]:,.0f}; {train['waits'][0]:.1%} of the time was spent waiting for data.",
            "",
        ]
    if restart := results.get("second start of a compiled run"):
        lines += [
            f"Three compiled steps: {restart['first']:.0f} s from the start on, {restart['second']:.0f} s beside its "
            f"compiler cache of {restart['cache_mib']:.0f} MiB.",
            "",
        ]
    return lines


def _recipe_lines(results):
    recipes = {part.removeprefix("recipe "): result for part, result in results.items() if part.startswith("recipe ")}
    if not recipes:
        return []
    one = next(iter(recipes.values()))
    return [
        f"| recipe, {one['images']:,} synthetic images, {one['resolution']} px in place of 224 | epochs | top-1 | minutes |",
        "|---|---|---|---|",
        *(f"| {name} | {r['epochs']} | {r['top1']:.2f} % | {r['seconds'] / 60:.1f} |" for name, r in recipes.items()),
        "",
    ]


def _step_lines(results):
    """Return the table of the steps: images/s, the ratio to torchvision's loop, peak memory."""
    figures = {}
    for part, result in results.items():
        if part.startswith("step: "):
            name = part.removeprefix("step: ").rpartition(", ")[0]
            figures.setdefault(name, {}).update({int(px): of for px, of in result["figures"].items()})
    if not figures:
        return []
    sizes = sorted({px for of in figures.values() for px in of})
    lines = [f"| train step | {' | '.join(f'{px} px' for px in sizes)} |", "|---" * (1 + len(sizes)) + "|"]
    for name, of in figures.items():
        cells = []
        for px in sizes:
            if px not in of:
                cells.append("")
            elif of[px] is None:
                cells.append("does not fit")
            else:
                reference = (figures.get("torchvision", {}).get(px) or of[px])["images_per_s"]
                peak = f", {of[px]['peak_mib'] / 1024:.2f} GiB" if of[px]["peak_mib"] else ""
                cells.append(f"{of[px]['images_per_s']:,.0f}, {of[px]['images_per_s'] / reference:.2f}x{peak}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return [*lines, "", "images/s, ratio to torchvision's loop, peak of the memory that PyTorch allocated.", ""]
