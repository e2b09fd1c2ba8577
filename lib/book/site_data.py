"""What the pages are made of: the bibliography, the families, and the chapters' stored facts."""

from dataclasses import dataclass, field
from pathlib import Path

from pybtex.database import parse_file
from pybtex.exceptions import PybtexError
from pybtex.richtext import Text

from lib.book import params, places, record
from lib.errors import BookError

BIB = Path("data/papers.bib")

# The families in the order of the book; each is one chapter, `chapters/<slug>.ipynb`.
FAMILIES = {
    "patching": "Activation patching and circuits",
    "steering": "Activation steering",
    "dictionaries": "Sparse autoencoders: learning a dictionary",
    "feature_geometry": "Superposition, and matching features across layers and models",
    "sparsity": "Activation sparsity",
    "quantization": "Quantizing weights and activations",
    "multiplication_free": "Shift, lookup and integer arithmetic",
    "sinks": "Massive activations and attention sinks",
    "attention": "What attention computes",
    "long_context": "Long context and the KV cache",
    "activation_functions": "Activation functions",
    "normalization": "Normalization and stable training",
    "activation_memory": "Training without storing activations",
    "codes": "Activation patterns as codes",
    "test_time": "Activation matching and test-time adaptation",
    "merging": "Merging and distilling by matching activations",
    "experts": "Mixtures of experts",
    "continual": "Continual learning and forgetting",
    "unlearning": "Unlearning",
    "safety": "Safety from activations",
    "hallucination": "Hallucination",
    "robustness": "Adversarial and perceptual robustness",
    "contrastive": "Contrastive and self-supervised representations",
    "attention_control": "Diffusion: training-free attention control",
    "personalization": "Diffusion: learning a subject",
    "generative_vision": "Generative models of images and views",
    "shift": "Distribution shift, causality and fairness",
    "brains": "Brains, eyes and bodies",
    "audio_robots": "Sound and embodied agents",
}


@dataclass(frozen=True)
class LearningPath:
    """An order in which to read some chapters, by slug: of families, or written like `hooks`."""

    title: str
    about: str
    chapters: tuple[str, ...]


# Three ways through the families. Each chapter comes after those that it builds on.
PATHS = {
    "understand": LearningPath(
        "Inside a language model",
        "What a model computes and where: find it by patching, name it with a dictionary, change "
        "it by steering, and ask whether you can tell what a model knows.",
        ("hooks", "patching", "attention", "sinks", "dictionaries", "feature_geometry", "steering",
         "codes", "hallucination", "safety", "unlearning", "brains"),
    ),
    "economy": LearningPath(
        "Small and fast",
        "What most activations are not needed for: fewer of them, fewer bits each, cheaper "
        "arithmetic, and less memory in training and in use.",
        ("hooks", "kernels", "sinks", "sparsity", "activation_functions", "normalization",
         "quantization", "multiplication_free", "long_context", "activation_memory", "experts",
         "merging"),
    ),
    "learn": LearningPath(
        "Learning, images and the world",
        "What representations learn and how they travel: to other data, to other tasks, into "
        "pictures and sound.",
        ("hooks", "patching", "contrastive", "robustness", "shift", "test_time", "continual",
         "attention_control", "personalization", "generative_vision", "audio_robots"),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Paper:
    """One entry of the bibliography. `authors` are last names; `url` may be empty."""

    key: str
    title: str
    authors: tuple[str, ...]
    year: str
    url: str
    family: str

    @property
    def byline(self) -> str:
        """`Gu et al. 2024`, `Elhage and Olah 2021`, `Makelov 2023`."""
        names = " and ".join(self.authors) if len(self.authors) < 3 else f"{self.authors[0]} et al."
        return f"{names} {self.year}".strip()


@dataclass(frozen=True)
class Chapter:
    """The facts a page needs from one notebook; `facts` is its metadata `book`."""

    slug: str
    facts: dict
    claims: list[dict]
    parameters: dict[str, params.Parameter] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """The numbers at the top of the scoreboard."""

    papers: int
    done: int
    claims: int
    held: int

    @property
    def failed(self) -> int:
        """Claims that did not hold."""
        return self.claims - self.held


def papers(bib: Path) -> list[Paper]:
    """All papers of the bibliography at `bib`, in the order of the file.

    Raises BookError, in one line, for a file that is no BibTeX and for an entry whose keywords
    name no family.
    """
    try:
        entries = parse_file(str(bib), bib_format="bibtex").entries
    except (OSError, UnicodeDecodeError, PybtexError) as error:
        first = str(error).strip().splitlines()[0]
        raise BookError(f"cannot read the bibliography {bib.name}: {first}") from None
    return [_paper(key, entry, bib) for key, entry in entries.items()]


def _paper(key: str, entry, bib: Path) -> Paper:
    fields = entry.fields
    words = [word.strip() for word in fields.get("keywords", "").split(",")]
    family = next((word for word in words if word in FAMILIES), None)
    if family is None:
        raise BookError(f"{bib.name}: {key} needs one family in its keywords, has {words}")
    people = entry.persons.get("author", [])
    authors = tuple(_plain(" ".join(person.prelast_names + person.last_names)) for person in people)
    url = fields.get("url", "")
    if not url and fields.get("eprint"):
        url = f"https://arxiv.org/abs/{fields['eprint']}"
    if not url and fields.get("doi"):
        url = f"https://doi.org/{fields['doi']}"
    return Paper(
        key, _plain(fields.get("title", key)), authors, fields.get("year", ""), url, family
    )


def _plain(latex: str) -> str:
    """LaTeX as text: accents as letters, braces gone."""
    return str(Text.from_latex(latex))


def chapter(path: Path) -> Chapter:
    """The facts of the notebook at `path`. Raises BookError where it is no valid notebook."""
    notebook = places.read_notebook(path)
    facts = dict(notebook.metadata.get("book", {}))
    parameters = params.read_parameters(notebook, f"chapters/{path.name}")
    return Chapter(path.stem, facts, record.claims(notebook), parameters)


def check_claims(claims: list[dict], all_papers: list[Paper], where: str) -> None:
    """Raise BookError for a claim on a paper that is not in the bibliography or with no verdict."""
    known = {paper.key for paper in all_papers}
    for claim in claims:
        if claim.get("paper") not in known:
            raise BookError(f"{where}: claim on {claim.get('paper')!r}, which {BIB} does not have")
        if not isinstance(claim.get("holds"), bool):
            verdict = f"verdict {claim.get('holds')!r} of a claim on {claim['paper']}"
            raise BookError(f"{where}: {verdict} is neither true nor false")


def claims_by_paper(chapters: list[Chapter]) -> dict[str, list[tuple[str, dict]]]:
    """Every claim of the chapters under its paper's key: `{key: [(slug, claim), …]}`.

    A claim shown twice in one chapter counts once.
    """
    found: dict[str, list[tuple[str, dict]]] = {}
    seen = set()
    for one in chapters:
        for claim in one.claims:
            mark = (one.slug, claim.get("paper"), claim.get("says"))
            if mark not in seen:
                seen.add(mark)
                found.setdefault(claim.get("paper"), []).append((one.slug, claim))
    return found


def score(all_papers: list[Paper], found: dict[str, list[tuple[str, dict]]]) -> Score:
    """Papers, papers with at least one claim put to the test, claims, and claims that held."""
    verdicts = [
        claim["holds"] is True for paper in all_papers for _, claim in found.get(paper.key, [])
    ]
    done = sum(paper.key in found for paper in all_papers)
    return Score(len(all_papers), done, len(verdicts), sum(verdicts))
