"""The `book` command: run, build, check and compare the chapters of the book.

Thin over papermill, nbclient, nbformat and jupyter-book. `python -m lib.book.cli --help` starts it
where the package is not installed.

    cli       the command line
    places    where things are: the book's root, chapters, runs; files written whole or not at all
    params    the typed parameters of a chapter and their ranges
    runs      one run of a chapter and the record it leaves
    engine    the kernel of a run: its environment and peak memory
    progress  the line that says how far it is
    page      its HTML page
    record    what a record says about software, machine and claims
    store     a run's outputs written back into the chapter, clean and stable
    stale     what produced a chapter's outputs, and whether it changed since
    status    the table of `book status`
    sweep     many runs of a chapter on a Dask cluster: sweep_plan (its points), sweep_state,
              sweep_store (locks, records), sweep_ship and sweep_point (on a worker), sweep_dask,
              sweep_progress, sweep_page with sweep_template, sweep_table, sweep_compare
    workshop  a session on chapters: workshop_plan (what fits the minutes), workshop_exercises and
              workshop_text (taken from the notebook), workshop_edition, workshop_slides with
              reveal, workshop_pack
    compare   two runs or two sweeps side by side
    check     a chapter against the guide; the rules are in check_parts, check_claims, check_code
              and check_outputs, on a chapter as `chapter` reads it
    new       the scaffold of a chapter; its cells are in template
    nbval_claims  how the tests compare a chapter's claims with the stored ones
    site, build   the pages
"""

import sys

# jsonschema, which nbformat imports, compiles a grammar for the addresses in a schema: more than a
# second that no notebook needs and that every command would wait for.
_KEPT = "rfc3987_syntax" in sys.modules
if not _KEPT:
    sys.modules["rfc3987_syntax"] = None
import nbformat  # noqa: E402, F401

if not _KEPT:
    del sys.modules["rfc3987_syntax"]
