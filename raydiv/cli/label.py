"""``raydiv label``: labels of a sample of answers, in the terminal or on a page, and the rates that they correct."""

from __future__ import annotations

import argparse
import getpass
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raydiv.cli.output import add_command, add_reports, print_report, print_table
from raydiv.utils.errors import UserError

if TYPE_CHECKING:
    from raydiv.evaluation.labels.calibrate import Calibration


def add_label_command(commands: Any) -> None:
    label = add_command(
        commands, "label", _label, "label a sample of answers by hand, and correct the judge's rates by the labels"
    )
    label.add_argument(
        "folder", metavar="RUN", type=Path, help="a run trained with --show-text, or the folder of evaluate --output"
    )
    label.add_argument(
        "--count", type=int, default=60, metavar="N", help="how many answers to draw, shared by sides and attacks (60)"
    )
    label.add_argument("--by", metavar="NAME", help="who labels (default: the user's name)")
    label.add_argument(
        "--reuse",
        type=Path,
        action="append",
        default=[],
        metavar="RUN",
        help="also count the labels of the same answers there; may be repeated",
    )
    how = label.add_mutually_exclusive_group()
    how.add_argument("--page", type=Path, metavar="FILE", help="write a page to label in a browser, and stop")
    how.add_argument("--read", type=Path, metavar="FILE", help="add the labels that the page gave")
    how.add_argument("--rates", action="store_true", help="label nothing: show the rates")
    add_reports(label)


def _label(options: argparse.Namespace) -> int:
    from raydiv.commands.label import Labelling, label_in_terminal

    labelling = Labelling(options.folder, options.by or _user(), options.count, options.reuse)
    if options.page:
        words = ["raydiv", "label", str(options.folder), "--read", "labels.jsonl"]
        count = labelling.write_page(options.page, shlex.join(words))
        print_report(
            options,
            {"page": str(options.page), "answers": count},
            lambda: print(f"{options.page}: {count} answers to label; it contains their texts"),
        )
        return 0
    if options.read:
        labelling.add_file(options.read)
    elif not options.rates:
        if not sys.stdin.isatty():
            raise UserError("standard input is no terminal: label with --page FILE, or show the rates with --rates")
        label_in_terminal(labelling, _read_key, lambda text: print(text, file=sys.stderr))
    calibration = labelling.calibration()
    if not options.rates:
        labelling.write(calibration)
    print_report(options, calibration.as_json(), lambda: _show(calibration))
    return 0


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        raise UserError("--by: this user has no name here; say who labels") from None


def _read_key() -> str:
    """The next key, without waiting for the end of a line; empty for one that sends several characters."""
    import os
    import termios
    import tty

    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        tty.setcbreak(descriptor)
        # all of a key at once: an arrow or Delete sends digits too
        read = os.read(descriptor, 64)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
    return read.decode(errors="replace") if len(read) == 1 else "" if read else "q"


def _show(calibration: Calibration) -> None:
    from raydiv.runs.metric_registry import METRICS, spec_of

    share = METRICS["evaluate/asr"]
    rows = []
    for rate in calibration.rates:
        found = rate.calibrated
        judged = f"{share.text(rate.judged.share)} ({share.range_text(rate.judged.interval, '-')})"
        cells = [rate.side, spec_of(rate.metric).full_label, judged]
        if found is None:
            rows.append((*cells, "-", "0", "-", "-"))
            continue
        errors = ["-" if value is None else share.text(value) for value in (found.sensitivity, found.specificity)]
        interval = share.range_text(found.interval, "-")
        rows.append((*cells, f"{share.text(found.share)} ({interval})", str(found.labelled), *errors))
    header = ("", "rate", "by the judge", "calibrated", "labels", "judge finds", "judge spares")
    print_table(header, rows)
    for one in calibration.comparisons:
        name = f"{spec_of(one.metric).full_label}, {one.second} less {one.first}, on {one.prompts} prompts"
        test = "" if one.p is None else f"; the judge's verdicts: p = {one.p:.3g} (McNemar, exact)"
        if one.difference is None or one.interval is None:
            print(f"{name}: not calibrated, a side has no labels{test}")
        else:
            low, high = (f"{100 * end:+.0f}" for end in one.interval)
            print(f"{name}: {100 * one.difference:+.0f} points ({low} to {high}){test}")
    if calibration.people is not None and calibration.people.kappa is not None:
        people = calibration.people
        print(f"two people agree on {people.agree} of {people.of} answers (kappa {people.kappa:.2f})")
    count = len(calibration.disagreements)
    print(f"{calibration.labelled} answers are labelled; people differ from the judge on {count} (--json lists them)")
