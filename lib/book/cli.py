"""The command line `book`. Bad input gets one line on stderr and exit code 2."""

import argparse
import os
import sys

from lib.errors import BookError


class _Parser(argparse.ArgumentParser):
    """Errors as one line that begins with `book:`."""

    def error(self, message):
        raise BookError(f"{message} (see `{self.prog} --help`)")


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command."""
    top = _Parser(prog="book", description="Run, build, check and compare the book's chapters.")
    commands = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    run = commands.add_parser("run", help="run a chapter and keep a record in runs/")
    run.add_argument("chapter")
    run.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a parameter of the chapter; may be given many times and beats the profile",
    )
    run.add_argument("--profile", default="default", help="smoke, default or full")
    run.add_argument("--store", action="store_true", help="write the outputs into the chapter")
    run.add_argument(
        "--measure", action="store_true", help="note the profile's seconds and memory in it"
    )
    run.set_defaults(call=_run)

    sweep = commands.add_parser("sweep", help="run a chapter at every combination of values")
    sweep.add_argument("chapter", nargs="?")
    sweep.add_argument(
        "-p",
        dest="parameters",
        action="append",
        default=[],
        metavar="NAME=A,B,C",
        help="values of a parameter; the points are the product of all that are given",
    )
    sweep.add_argument("--seeds", type=int, metavar="N", help="N values of the parameter seed")
    sweep.add_argument("--profile", default="default", help="smoke, default or full")
    sweep.add_argument("--scheduler", metavar="ADDRESS", help="a Dask scheduler, tcp://host:8786")
    sweep.add_argument("--workers", type=int, metavar="N", help="processes on this machine")
    sweep.add_argument("--resume", metavar="ID", help="go on with a sweep that was interrupted")
    sweep.set_defaults(call=_sweep)

    build = commands.add_parser("build", help="build the pages; a warning is an error")
    build.add_argument("--execute", action="store_true", help="rerun and store stale chapters")
    build.add_argument("--pdf", action="store_true", help="also print the book as one PDF")
    build.add_argument("--out", metavar="FOLDER", help="build into FOLDER instead of _build")
    build.set_defaults(call=_build)

    status = commands.add_parser("status", help="which chapters are stale, and why")
    status.add_argument("--check", action="store_true", help="exit with 1 if any is stale")
    status.set_defaults(call=_status)

    compare = commands.add_parser("compare", help="two runs or sweeps, flipped claims first")
    for name in ("a", "b"):
        compare.add_argument(
            name, metavar=name.upper(), help="a run's or sweep's id or folder, or a chapter"
        )
    compare.set_defaults(call=_compare)

    check = commands.add_parser("check", help="check chapters against the guide")
    check.add_argument("chapters", nargs="*", metavar="CHAPTER", help="all where none is named")
    check.add_argument(
        "--complete", action="store_true", help="papers not yet written are findings too"
    )
    check.set_defaults(call=_check)

    workshop = commands.add_parser("workshop", help="a session on chapters: editions and slides")
    workshop.add_argument("chapters", nargs="+", metavar="CHAPTER")
    workshop.add_argument("--minutes", type=int, default=90, metavar="45|90|180", help="in all")
    workshop.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    workshop.set_defaults(call=_workshop)

    new = commands.add_parser("new", help="scaffold a chapter that already runs and passes check")
    new.add_argument("slug")
    new.add_argument("--paper", metavar="KEY", help="add an unwritten section on this paper")
    new.add_argument("--no-papers", action="store_true", help="a chapter on no family of papers")
    new.set_defaults(call=_new)
    return top


def _run(args) -> int:
    from lib.book import places, record, runs

    folder = runs.run(args.chapter, args.parameters, args.profile, args.store, args.measure)
    facts = record.read(folder)
    held, total = record.score(facts["claims"])
    print(
        f"{facts['chapter']}: {facts['seconds']} s, {facts['peak_gib']} GiB,"
        f" {held} of {total} claims held; {folder.relative_to(places.root())}/notebook.html"
    )
    return 0


def _sweep(args) -> int:
    from lib.book import places, sweep

    state = sweep.sweep(
        args.chapter, args.parameters, args.seeds, args.profile, args.scheduler, args.workers,
        args.resume,
    )  # fmt: skip
    points = [point["state"] for point in state["points"]]
    failed = sum(each != "ok" for each in points)
    page = f"{places.root() / 'runs' / state['chapter'] / 'sweeps' / state['sweep']}/index.html"
    print(
        f"{state['chapter']}: {len(points) - failed} of {len(points)} points finished"
        f"{f', {failed} failed' if failed else ''}; {os.path.relpath(page)}"
    )
    return 1 if failed else 0


def _build(args) -> int:
    from lib.book import build

    return build.main(args) or 0


def _status(args) -> int:
    from lib.book import places, status

    return status.report(places.root(), args.check)


def _compare(args) -> int:
    from lib.book import compare, places

    print(compare.text(places.root(), args.a, args.b))
    return 0


def _check(args) -> int:
    from lib.book import check, places

    return check.report(places.root(), args.chapters, args.complete)


def _workshop(args) -> int:
    from pathlib import Path

    from lib.book import places, workshop

    out = Path(args.out).expanduser()
    plans = workshop.make(places.root(), args.chapters, args.minutes, out)
    for plan in plans:
        done = len(plan.exercises) - len(plan.homework)
        print(
            f"{plan.chapter.slug}: {plan.minutes} minutes, {done} of {len(plan.exercises)}"
            f" exercises, {len(plan.reading)} sections left for reading"
        )
    print(f"hand out {args.out}/student.zip, teach from {args.out}/instructor")
    return 0


def _new(args) -> int:
    from lib.book import new, places

    print(new.scaffold(places.root(), args.slug, args.paper, not args.no_papers))
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command; its exit code: 0 done, 1 failed or findings, 2 bad input, 130 Ctrl-C."""
    try:
        args = parser().parse_args(arguments)
        if args.command is None:
            parser().print_help()
            return 2
        return args.call(args)
    except BookError as error:
        print(f"book: {error}", file=sys.stderr)
        return getattr(error, "code", 2)
    except KeyboardInterrupt:
        print("book: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `book status | head`
        sys.stdout = None
        return 1
    except Exception as error:
        if os.environ.get("BOOK_DEBUG"):
            raise
        said = " ".join(str(error).split()) or "no message"
        print(f"book: {type(error).__name__}: {said} (BOOK_DEBUG=1 says where)", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
