"""The report of one run, section by section: each takes the Run and the price of an hour, and returns blocks."""

import statistics

from config import CONFIG, RECIPES
from engine.report.charts import chart, timeline
from engine.report.figures import best_of, column, conditions, energy_kwh, machine_hours, phases, why_not_comparable
from engine.report.galleries import blocks_of_galleries
from engine.report.history import FINISHED_END, SILENT_END, interruptions
from engine.report.page import heading, paragraph, table
from engine.report.words import clock, interruptions_of, percent, position, spread
from engine.run.published import SEED_RUN, published_curve, published_result
from engine.run.weights import WEIGHTS


def report_of_run(run, price_per_hour=None):
    """Return (title, blocks) of the report of a run."""
    sections = (state, verdicts, results, curves, pictures, sessions, machine, published_figures, settings)
    return f"Training report: {run.name}", [block for section in sections for block in section(run, price_per_hour)]


def state(run, price_per_hour):
    """Return where the run stands, in a paragraph."""
    return [paragraph(_state_in_words(run))]


def _state_in_words(run):
    done, planned = (run.records[-1]["epoch"] if run.records else 0), run.config["epochs"]
    if not run.sessions:
        return f"{done} epochs are recorded; there is no log of the run, so sessions and configuration are unknown."
    last = run.sessions[-1]
    data = f"{last.images:,} images of {last.classes:,} classes"
    what = f"Recipe {run.recipe}: {run.config['architecture']} on {data}, {last.hardware}."
    if last.ended == FINISHED_END:
        return f"{what} Finished after {done} epoch{'s' * (done != 1)}."
    ended = f"{last.ended}, last heard of at {last.last_word:%Y-%m-%d %H:%M:%S}" if last.ended == SILENT_END else last.ended
    return f"{what} Not finished: {done} of {planned} epochs are done ({ended})."


def verdicts(run, price_per_hour):
    """Return the alarms of the live verdict: where each began and ended, and what it said."""
    rows = []
    for session in run.sessions:
        of_session = []
        for event in session.verdicts or []:
            at = position((event["epoch"], event["batch"])) if "epoch" in event else "before the training"
            if event.get("begins"):
                of_session.append([event["name"], at, "", event["text"]])
            else:
                for row in of_session:
                    if row[0] == event["name"] and not row[2]:
                        row[2] = at
        lasting = "still going on" if session.ended == SILENT_END else "lasted to the session's end"
        rows += [(name, begun, ended or lasting, text) for name, begun, ended, text in of_session]
    if rows:
        return [heading("Verdict"), table(("alarm", "from", "to", "what it said"), rows)]
    if not run.sessions or any(session.verdicts is None for session in run.sessions):
        return []
    return [heading("Verdict"), paragraph("No alarm was raised.")]


def results(run, price_per_hour):
    """Return the best and the last figures, and the accuracy by phase."""
    found = best_of(run.records)
    if found is None:
        return [paragraph("No epoch has been validated yet.")]
    last, (top1, epoch, kind) = run.records[-1], found
    best_weights = WEIGHTS[kind]
    best = next(record for record in run.records if record["epoch"] == epoch)
    rows = [
        ("best validation top-1", f"{percent(top1)}, epoch {epoch}, {best_weights.in_words}, {conditions(run)}"),
        ("its top-5", percent(best.get(f"{best_weights.column}_top5"))),
    ]
    if best.get(f"{best_weights.column}_balanced_top1") is not None:
        rows.append(("its mean of the classes' accuracies", percent(best[f"{best_weights.column}_balanced_top1"])))
    if best.get(f"{best_weights.column}_flip_top1") is not None:
        rows.append(("the same with image and mirror image", percent(best[f"{best_weights.column}_flip_top1"])))
    for weights in WEIGHTS.values():
        rows.append((f"last epoch, {weights.in_words}", percent(last.get(f"{weights.column}_top1"))))
    for other in last.get("more_val", ()):
        scores = ", ".join(f"{name} {percent(of['top1'])}" for name, of in other.items() if isinstance(of, dict))
        rows.append((f"last epoch at {other['val_resolution']} px", scores))
    rows.append(("last training loss", f"{last['train_loss']:.3f}" if last.get("train_loss") is not None else None))
    of_phases = []
    for name, records in phases(run):
        scores = [best_of([record])[0] for record in records if best_of([record])] or [None]
        hours = sum(record.get("seconds", 0) for record in records) / 3600
        epochs = f"{records[0]['epoch']} to {records[-1]['epoch']}"
        speed = spread([record["images_per_s"] for record in records if record.get("images_per_s")])
        of_phases.append((name, epochs, percent(scores[0]), percent(scores[-1]), percent(max(scores)), speed, clock(hours)))
    header = (
        "phase",
        "epochs",
        "top-1 after its first",
        "after its last",
        "best",
        "images/s (lowest to highest)",
        "training time",
    )
    return [heading("Results"), table(("", ""), rows), heading("By phase"), table(header, of_phases)]


def curves(run, price_per_hour):
    """Return the curves."""
    records = run.records
    names = {weights.column: weights.in_words for weights in WEIGHTS.values()} | {"val": "validation"}
    top1 = [(name, column(records, f"{prefix}_top1")) for prefix, name in names.items()]
    top1.append(("training, augmented", column(records, "train_top1")))
    published = published_curve(run.recipe, run.config["epochs"]) if why_not_comparable(run) is None else None
    if published is not None:
        top1.append((f"published: {published[1]}", published[0], "dotted"))
    loss = [("validation", column(records, "val_loss")), ("averaged weights", column(records, "averaged_val_loss"))]
    loss += [("training", column(records, "train_loss"))]
    waits = {epoch: 100 * share for epoch, share in column(records, "data_wait_share").items()}
    found = [
        chart("Top-1 accuracy", top1, "%"),
        chart("Loss", loss, "nats"),
        chart("Learning rate at the epoch's end", [("rate", column(records, "learning_rate"))], "rate"),
        chart("Training resolution", [("resolution", column(records, "train_resolution"))], "px", steps=True),
        chart("Throughput of training", [("images/s", column(records, "images_per_s"))], "images/s"),
        chart("Time spent waiting for data", [("share", waits)], "%"),
        chart("Gradient norm before clipping", [("mean", column(records, "grad_norm"))], "L2 norm"),
        chart("GPU utilisation", [("mean", column(records, "gpu_utilization_percent"))], "%"),
        chart("GPU power", [("mean", column(records, "gpu_power_w"))], "W"),
        chart("GPU temperature", [("highest", column(records, "gpu_temperature_highest_c"))], "°C"),
    ]
    found = [block for block in found if block is not None]
    if not found:
        return [paragraph("No curves: matplotlib is not installed.")] if records else []
    return [heading("Curves"), *found]


def pictures(run, price_per_hour):
    """Return what evaluate.py --details has left in the run's folder: images, calibration, accuracy by class."""
    return blocks_of_galleries(run.folder)


def sessions(run, price_per_hour):
    """Return the sessions, the interruptions and what they cost."""
    if not run.sessions:
        return []
    start = run.sessions[0].begun
    spans = [((s.begun - start).total_seconds(), (s.last_word - start).total_seconds()) for s in run.sessions]
    unit, size = ("hours", 3600) if spans[-1][1] > 2 * 3600 else ("minutes", 60)
    rows = []
    for number, session in enumerate(run.sessions, start=1):
        at = f"{session.begun:%Y-%m-%d %H:%M:%S}"
        rows.append(
            (number, at, clock(session.seconds / 3600), position(session.first_position), position(session.last_position))
        )
        rows[-1] += (session.ended, f"warnings: {len(session.warnings)}" if session.warnings else "")
    breaks = interruptions(run.sessions)
    lost_images = sum(one.images_lost for one in breaks)
    speeds = list(column(run.records, "images_per_s").values())
    lost = lost_images / statistics.median(speeds) / 3600 if speeds else 0
    away = sum(one.seconds_away for one in breaks) / 3600
    text = f"Sessions: {len(run.sessions)}; interruptions: {len(breaks)}."
    if breaks:
        steps = sum(one.steps_lost for one in breaks)
        twice = f"at least {steps:,} steps were done twice ({clock(lost)} of training)" if steps else "no step was done twice"
        text += f" Between sessions the run stood still for {clock(away)}; {twice}."
        if any(one.how == SILENT_END for one in breaks):
            text += " Of a session that was killed, the steps after its last word in the log are not known."
    header = ("session", "begun", "length", "from", "to", "end", "")
    bars = [(begin / size, end / size, number % 2) for number, (begin, end) in enumerate(spans)]
    found = [heading("Course"), paragraph(text), timeline("Sessions", bars, unit), table(header, rows)]
    warnings = [(f"{session.begun:%Y-%m-%d %H:%M}", text) for session in run.sessions for text in session.warnings]
    if warnings:
        found.append(table(("session of", f"warnings (the last {min(20, len(warnings))} of {len(warnings)})"), warnings[-20:]))
    return found


def machine(run, price_per_hour):
    """Return speed, use of the GPU, energy and cost."""
    records, hours = run.records, machine_hours(run)
    speeds, waits = list(column(records, "images_per_s").values()), list(column(records, "data_wait_share").values())
    energy, throttled = energy_kwh(run), {}
    for record in records:
        for reason, share in (record.get("gpu_throttled_share") or {}).items():
            throttled[reason] = max(throttled.get(reason, 0), share)
    reported = [record["gpu_memory_peak_mib"] for record in records if record.get("gpu_memory_peak_mib")]
    sampled = list(column(records, "gpu_memory_used_mib").values())
    lowest = list(column(records, "gpu_utilization_lowest_percent").values())
    busy = list(column(records, "gpu_utilization_percent").values())
    rows = [
        ("time of all sessions" if run.sessions else "training time", clock(hours)),
        ("images/s in training, mean of the epochs (lowest to highest)", spread(speeds)),
        ("their standard deviation", f"{statistics.stdev(speeds):,.1f}" if len(speeds) > 1 else None),
        ("share of training spent waiting for data", f"{100 * statistics.mean(waits):.1f} %" if waits else None),
        ("GPU memory, peak that PyTorch allocated", f"{max(reported):,.0f} MiB" if reported else None),
        ("GPU memory, peak as NVML counts it", f"{max(sampled):,.0f} MiB" if sampled else None),
        ("GPU utilisation, mean and lowest", f"{statistics.mean(busy):.0f} %, {min(lowest):.0f} %" if busy else None),
        ("GPU temperature, highest", _highest(records, "gpu_temperature_highest_c", "°C")),
        ("GPU power, mean", spread(list(column(records, "gpu_power_w").values()))),
        ("GPU energy of the recorded epochs", f"{energy:.3f} kWh" if energy is not None else None),
        ("clock held down, worst epoch", ", ".join(f"{why} {share:.0%}" for why, share in throttled.items()) or None),
        ("skipped steps", sum(record.get("skipped_steps", 0) for record in records)),
        ("unreadable training images", records[-1].get("bad_images", 0) if records else 0),
    ]
    if price_per_hour is not None:
        rows.append(("cost", f"{hours * price_per_hour:,.2f} at {price_per_hour:g} per hour"))
        if (best := best_of(records)) and best[0] and hours:
            rows.append(("cost of a point of top-1", f"{hours * price_per_hour / best[0]:,.3f}"))
    note = [] if busy else [paragraph("No GPU figures were sampled: the run had no GPU, or NVML did not answer.")]
    return [heading("Machine"), table(("", ""), rows), *note]


def _highest(records, key, unit):
    values = column(records, key).values()
    return f"{max(values):.0f} {unit}" if values else None


def published_figures(run, price_per_hour):
    """Return the run beside the seed's, and beside what was published for its recipe."""
    differs = why_not_comparable(run)
    published = published_result(run.recipe, run.config["epochs"]) if differs is None else None
    speeds = list(column(run.records, "images_per_s").values())
    memory = list(column(run.records, "gpu_memory_used_mib").values())
    best = best_of(run.records)
    hours = machine_hours(run)
    rows = [
        ("best top-1", percent(best[0]) if best else "none yet", percent(SEED_RUN["top1"])),
        ("measured with", conditions(run), "224 px"),
        ("epochs", len(run.records), f"about {SEED_RUN['epochs']} of 100"),
        ("hours", f"{hours:.2f}", f"about {SEED_RUN['hours']}"),
        ("images/s in training", spread(speeds), SEED_RUN["images_per_s"]),
        ("GPU memory (NVML)", f"{max(memory):,.0f} MiB" if memory else "no GPU figures", f"{SEED_RUN['memory_mib']:,} MiB"),
        ("interruptions", interruptions_of(run), SEED_RUN["interruptions"]),
    ]
    if price_per_hour is not None:
        at = SEED_RUN["price_per_hour"]
        rows.append(("cost", f"{hours * price_per_hour:,.2f}", f"{SEED_RUN['hours'] * at:,.2f} at {at:g} per hour, on demand"))
    found = [heading("Beside the seed's run and what was published")]
    if differs is not None:
        found.append(paragraph(f"This run is {differs}: the accuracies cannot be compared."))
    found.append(table(("", "this run", SEED_RUN["name"]), rows))
    if published is not None:
        found.append(paragraph(_published_in_words(published, run.config["epochs"])))
    return found


def _published_in_words(published, epochs):
    if not published.between:
        return f"Published for this recipe at {epochs} epochs: {published.top1} % ({published.source})."
    low, high = published.between
    return (
        f"Nothing is published for this recipe at {epochs} epochs; interpolated between {low} and {high} epochs: "
        f"{published.top1:.2f} % ({published.source})."
    )


def settings(run, price_per_hour):
    """Return what the configuration changes of the defaults, and the environments of the sessions."""
    if not run.sessions:
        return []
    of_recipe = RECIPES.get(run.recipe, {})

    def set_by(key, value):
        if key == "learning_rate" and any(session.asked_config.get(key) == "auto" for session in run.sessions):
            return "range test, asked for by auto"
        return "recipe" if of_recipe.get(key) == value else "command line"

    changed = [
        (key, str(value), str(CONFIG[key]), set_by(key, value))
        for key, value in run.config.items()
        if key in CONFIG and value != CONFIG[key]
    ]
    environments = []
    for number, session in enumerate(run.sessions, start=1):
        known = session.environment
        versions = ", ".join(f"{name} {version}" for name, version in known.get("versions", {}).items() if version)
        gpu = f"{known['gpu']}, CUDA {known['cuda']}" if known.get("gpu") else "no GPU"
        environments.append(
            (number, gpu, f"{known.get('cpu')}, {known.get('cores')} cores", versions, str(known.get("commit")))
        )
    return [
        heading("Configuration"),
        paragraph(f"What differs from the defaults of {len(CONFIG)} keys."),
        table(("key", "value", "default", "set by"), changed),
        heading("Environment"),
        table(("session", "GPU", "CPU", "versions", "commit"), environments),
    ]
