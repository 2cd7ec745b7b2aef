"""The contract of the pipeline and its knobs: the one place to change a setting.

UPPER_CASE constants are the contract: what would make yesterday's vectors or files
wrong if it changed (prompts, image preparation, folder and file formats). They enter
the fingerprints that the phases compare.

`Config` holds the knobs. Every field is a command-line flag of the phases that use it
(`_` becomes `-`), made by `parse_config`: one place to look, one way to override.
"""

import argparse
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

PROGRAM_VERSION = "1.9.2"
"""Version of the program, written into every manifest."""

# --- Classes ------------------------------------------------------------------------

CLASS_NAMES = ("FDT", "MTF", "TOR")
"""Class folders that phase 1 creates; any other folder name is a class as well."""

BACKGROUND_CLASSES = ("FDT",)
"""Classes without an object in the beam: described with BACKGROUND_PROMPTS."""

INCONCLUSIVE = "no concluyente"
"""What phase 4 prints where it should not name a class."""

# --- Files, and the phases that write them ------------------------------------------

FILE_LIST = "manifiesto.csv"  # 1: one line per written file, in chronological order
SHEET = "vista_previa.html"  # 1: the page to label from
SHEET_THUMBNAILS = ".miniaturas"  # 1: folder, one JPEG per written file
REJECTED_LIST = "rechazados.csv"  # 1, 2: what was left out, and why
MANIFEST = "manifiesto.json"  # 2: with what it was made; where it is, all is complete
DATASET_X = "dataset_X.npy"  # 2: float32 (n_rows, n_features)
DATASET_Y = "dataset_y.npy"  # 2: str (n_rows,)
DATASET_ROWS = "dataset_filas.csv"  # 2: one line per row
DATASET_IMAGES = "dataset_imagenes.csv"  # 2: one line per image, by first rows
DATASET_PIXELS = "dataset_pixeles.npy"  # 2: float32 (n_images, 40), in that order
THUMBNAIL_DIR = "miniaturas"  # 2: one JPEG per image, by its id, for the later pages
JOURNAL_DIR = "descripciones"  # 2, 4: append-only JSON Lines of answers per image
CLASSIFIER = "clasificador_svc.joblib"  # 3: loads with scikit-learn and numpy alone
SCALER = "escalador.joblib"  # 3: the same
SECOND_READER = "segundo_lector.joblib"  # 3: the same, a pipeline
NEIGHBOURS = "vecinos.npz"  # 3: generic rows, scaled: known images from unknown
CONFUSION_MATRIX = "matriz_de_confusion.png"  # 3
REPORT = "informe.html"  # 3: all that the console says, with the training images
METRICS = "metricas.json"  # 3: all figures; written last

# --- Image preparation: decoded pixels -> what the VLM sees -------------------------

PREPARATION_VERSION = 2
"""Raise it when the code of the preparation changes what it sends."""

IMAGE_SIDE_PX = 336
"""Input side of llava-phi3's vision encoder (CLIP ViT-L/14-336)."""

WINDOW_PERCENTILES = (0.5, 99.5)
"""Grey window: percentiles of the image, since it may use a sliver of its range."""

WINDOW_MIN_NOISE_SDS = 40.0
"""The window is never narrower than this many noise SDs of the reduced image.

Without it the noise of a flat field fills the grey range and is described as an object.
"""

PADDING_GREY = 116
"""Grey level beside images that are not square (llava-1.5 pads with 122, 116, 104)."""

# --- Prompts ------------------------------------------------------------------------
# No prompt names a class, a folder or a file. The differentiated sets differ in what
# they ask; the generic set is the one that phase 4 can ask of an unknown image.

OBJECT_PROMPTS = (
    "Describe the object in this X-ray image: its outline, its edges and its details.",
    "What shapes do you see in this radiograph? Name each shape and where it lies.",
    "Describe every straight edge in this X-ray image and how it is tilted.",
    "Are there circles, discs or rings in this radiograph? Say how many and where.",
    "Describe the borders between bright and dark areas of this X-ray image.",
    "Is there a pattern of parallel bars or lines here? Describe it and its position.",
    "Describe the largest object in this radiograph: shape, size and brightness.",
    "Describe the smallest details that you can make out in this X-ray image.",
    "How is the object in this radiograph arranged? Describe its layout.",
    "Which parts of this X-ray image are brightest and which darkest? What are they?",
    "Describe the contrast between the object and its background in this radiograph.",
    "Count the separate details in this X-ray image and describe how they are grouped.",
    "Describe what lies in the centre of this radiograph and what lies around it.",
    "Describe the symmetry of the object in this X-ray image.",
    "How much of this radiograph does the object cover, and where does it end?",
    "Describe this X-ray test object to somebody who can't see it.",
    "Describe the texture inside and outside the object in this X-ray image.",
    "Is the transition at the edges of this object sharp or gradual? Describe it.",
    "Go through this radiograph from left to right and describe what appears.",
    "Go through this X-ray image from top to bottom and describe what appears.",
)
"""Asked of images with an object in the beam: every class not named as background."""

BACKGROUND_PROMPTS = (
    "Describe how uniform the brightness of this X-ray image is.",
    "Does the brightness of this radiograph change from one side to the other? How?",
    "Describe the texture and the noise of this X-ray image.",
    "Compare the corners of this radiograph with its centre.",
    "Are there lines, bands or stripes in this X-ray image? Describe them.",
    "Describe the borders of this radiograph and anything that you see there.",
    "Is anything at all visible in this X-ray image apart from an even grey?",
    "Describe the grey levels of this radiograph and how they are distributed.",
    "Describe any spots, dots or blemishes in this X-ray image.",
    "Is the illumination of this radiograph even? Describe where it is not.",
    "Describe the gradient of brightness in this X-ray image, if there is one.",
    "Describe the overall appearance of this empty radiograph.",
    "How smooth or grainy is this X-ray image? Describe it in two sentences.",
    "Describe the brightest and the darkest region of this radiograph.",
    "Are there blocks or tiles of different brightness in this X-ray image?",
    "Describe the left half and the right half of this radiograph.",
    "Describe the upper half and the lower half of this X-ray image.",
    "Is there any structure in this radiograph? Say how faint or strong it is.",
    "Describe the contrast of this X-ray image.",
    "Describe this radiograph to somebody who can't see it.",
)
"""Asked of images of the background classes."""

GENERIC_PROMPTS = (
    "Describe this X-ray image in detail.",
    "What do you see in this radiograph?",
    "Describe the content of this X-ray image: shapes, edges, brightness and texture.",
    "Is there an object in this radiograph? Describe what the image shows.",
    "Describe the layout of this X-ray image from the centre to the borders.",
    "Summarise in three sentences what is visible in this radiograph.",
    "Describe the main visual features of this X-ray image.",
    "What stands out in this radiograph, and what is its background like?",
    "Describe this X-ray image as precisely as you can, without naming its purpose.",
    "List what can be seen in this radiograph: structures, patterns and uniformity.",
)
"""Asked of every training image and, in phase 4, of every new image."""

PROMPT_SETS = {
    "object": OBJECT_PROMPTS,
    "background": BACKGROUND_PROMPTS,
    "generic": GENERIC_PROMPTS,
}
"""The names under which `dataset_filas.csv` files each prompt."""

BREVITY = "Answer in two or three short sentences."
"""Ends every prompt, so that answers fit into the tokens that they may have."""

EMBED_PREFIXES = {
    "nomic-embed-text": "classification: ",
    "nomic-embed-text-v1": "classification: ",
    "nomic-embed-text-v1.5": "classification: ",
    "embeddinggemma": "task: classification | query: ",
}
"""What the makers of an embedder ask to stand before every text (its model card).

Keys are names as Ollama has them, without registry, owner and tag; others get nothing.
"""

PROBE_SENTENCE = "A radiograph of a uniform grey field without any object."
"""Embedded by phases 2 and 4: a changed embedding means another embedder."""

# --- Knobs --------------------------------------------------------------------------

ALL_PHASES, VLM = (1, 2, 3, 4), (2, 4)


def _knob(
    phases: Sequence[int],
    default: Any,
    help_text: str,
    least: float = 0,
    most: float = 1e6,
    **more: Any,
) -> Any:
    """A field that knows the phases that show it as a flag, and its limits.

    A number lies between `least` and `most`, both included. `more` may be `choices`,
    `form` (a regular expression for texts) and `flag` (a name other than the field's).
    """
    given = {"help": help_text, "phases": phases, "least": least, "most": most}
    free = {"choices": None, "form": ".*", "flag": ""}
    return field(default=default, metadata={**given, **free, **more})


@dataclass(frozen=True, kw_only=True)
class Config:
    """The knobs of all phases; each field is a flag of the phases that it names."""

    base: Path = _knob(ALL_PHASES, Path(), "folder that holds the data folders")
    input_dir: Path = _knob((1,), Path("input_dicom"), "the user's DICOM files")
    decompressed_dir: Path = _knob(
        (1,), Path("f1_descomprimidos"), "the decompressed files"
    )
    labelled_dir: Path = _knob(
        (1, 2), Path("datos_etiquetados"), "one subfolder per class"
    )
    dataset_dir: Path = _knob(
        ALL_PHASES, Path("dataset_final_vlm"), "the vectors and the journal"
    )
    model_dir: Path = _knob((3, 4), Path("modelo_final_vlm"), "the model")

    host: str = _knob(
        VLM,
        "",
        "address of the Ollama server, or of several: A,B,C (default: OLLAMA_HOST, "
        "else http://127.0.0.1:11434)",
    )
    any_host: bool = _knob(
        VLM, False, "go on without servers that the preflight refuses"
    )
    dask: str = _knob(
        VLM,
        "",
        "Dask scheduler (tcp://name:8786, tls://name:8786) whose workers ask their own "
        "OLLAMA_HOST, or local:N for N workers here",
        form=r"|local:[1-9]\d*|[a-z]+://\S+",
    )
    vlm: str = _knob(VLM, "llava-phi3", "vision language model that describes")
    embed_model: str = _knob(VLM, "nomic-embed-text", "makes vectors of descriptions")
    server_parallel: int = _knob(VLM, 1, "the server's OLLAMA_NUM_PARALLEL", 1)
    concurrency: int = _knob(VLM, 0, "requests at once; 0 means --server-parallel + 1")
    pull: bool = _knob(VLM, False, "download missing models first")
    wait: float = _knob(VLM, 600.0, "seconds that a server may be away", most=1e6)
    temperature: float = _knob(VLM, 0.7, "sampling temperature of the VLM", most=100)
    num_predict: int = _knob(VLM, 160, "tokens that a description may have", 16)
    num_ctx: int = _knob(VLM, 2048, "context length of the VLM, tokens", 1)
    keep_alive: str = _knob(
        VLM,
        "30m",
        "how long the server keeps models: 30m, 1h30m, seconds, or -1",
        # A duration of Go, or a number of seconds.
        form=r"-?(\d+(\.\d*)?(ns|us|µs|ms|s|m|h))+|-?\d+(\.\d+)?",
    )

    jobs: int = _knob((1,), 0, "worker processes; 0 means one per core")
    max_image_mb: int = _knob((1,), 2048, "reject images of more decoded megabytes", 1)
    item_timeout_s: float = _knob(
        (1,), 10.0, "seconds for a file, times 1 + its decoded size / 16 MB", 1e-3, 1e6
    )
    labels: tuple[Path, ...] = _knob(
        (1,), (), "move into class folders what these lists of a page name"
    )
    dry_run: bool = _knob((1,), False, "only show what --labels would do")

    no_sight_test: bool = _knob(
        VLM, False, "don't test whether the server looks at the pictures"
    )
    sight_test_only: bool = _knob(VLM, False, "only test that; print every distance")
    descriptions: int = _knob((2,), 50, "descriptions per labelled image", 1, 1000)
    generic_share: float = _knob(
        (2,), 0.2, "share of them asked with the generic prompts, 0 to 1", most=1
    )
    estimate: bool = _knob(
        (2,), False, "ask a few questions, print the expected duration and stop"
    )
    finished_only: bool = _knob((2,), False, "ask nothing: write what is complete")

    group_by: str = _knob(
        (3,),
        "image",
        "what must not be on both sides of a split",
        choices=("image", "detector", "station", "day", "study"),
    )
    search: str = _knob(
        (3,), "none", "hyper-parameter search", choices=("none", "short", "full")
    )
    seed: int = _knob((3,), 0, "seed of folds and projections", most=2**32 - 1)
    folds: int = _knob((3,), 5, "folds of the cross-validation", 2)
    kernel: str = _knob((3,), "linear", "kernel of the SVC", choices=("linear", "rbf"))
    c: float = _knob((3,), 0.01, "penalty C of the SVC", 1e-9, 1e9)
    max_error: float = _knob(
        (3,), 0.05, "share of errors aimed at among answers", most=1
    )
    known_refused: float = _knob(
        (3,), 0.05, "share of known images that may seem new", most=1
    )

    inference_descriptions: int = _knob(
        (3, 4), 10, "generic descriptions per new image", 1, 1000, flag="descriptions"
    )
    json: bool = _knob((4,), False, "print one JSON object per image")
    csv: Path | None = _knob((4,), None, "also write the results to this CSV file")
    html: Path | None = _knob((4,), None, "also write an HTML page with the pictures")
    copy_to: Path | None = _knob(
        (4,), None, "copy every image into a folder of its class below this one"
    )
    one_reader: bool = _knob((4,), False, "decide by the descriptions alone")
    any_modality: bool = _knob(
        (4,), False, "don't refuse a Modality that training does not have"
    )
    ask_all: bool = _knob((4,), False, "ask all questions, needed or not")
    force: bool = _knob((4,), False, "answer although model and server differ")

    verbose: bool = _knob(ALL_PHASES, False, "say more about every item")
    quiet: bool = _knob(ALL_PHASES, False, "say nothing but results and errors")

    def folder(self, name: str) -> Path:
        """The path of the folder field `name`, below the base directory."""
        return self.base / Path(getattr(self, name))

    @property
    def log_level(self) -> int:
        """Level for `logging`: --quiet leaves warnings and errors."""
        if self.quiet:
            return logging.WARNING
        return logging.DEBUG if self.verbose else logging.INFO

    @property
    def host_url(self) -> str:
        """Address of the Ollama server: --host, else OLLAMA_HOST, else the default."""
        return self.host or os.environ.get("OLLAMA_HOST") or "http://127.0.0.1:11434"

    def one_per_host(self) -> list["Config"]:
        """These knobs once for each server that --host or OLLAMA_HOST names."""
        hosts = [host for host in self.host_url.split(",") if host.strip()]
        return [replace(self, host=host.strip()) for host in hosts or [self.host_url]]

    @property
    def in_flight(self) -> int:
        """Requests to a server at once: one of them stands in the server's queue."""
        return self.concurrency or self.server_parallel + 1


GROUPS = {
    "base": "folders",
    "host": "server",
    "jobs": "this phase",
    "verbose": "output",
}
"""The field that begins each group of `--help`, and the group's title."""


def parse_config(
    phase: int,
    documentation: str,
    argv: Sequence[str] | None = None,
    positional: tuple[str, str] | None = None,
) -> tuple[Config, list[Path]]:
    """Read the flags of one phase from the command line.

    `documentation` is the script's docstring, shown by ``--help``; `argv`, without the
    program's name, is the process's own by default; `positional` is the name and the
    help of paths that are accepted, too.

    Returns
    -------
    (Config, list of Path)
        The knobs, and the positional paths (empty without `positional`).

    Raises
    ------
    SystemExit
        With code 2 on an unknown flag or a bad value, 0 after ``--help``.
    """
    parser = argparse.ArgumentParser(
        description=documentation,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=PROGRAM_VERSION)
    if positional:
        name, help_text = positional
        parser.add_argument("paths", nargs="*", type=Path, metavar=name, help=help_text)
    group = parser.add_argument_group("")
    for knob in fields(Config):
        if knob.name in GROUPS:
            group = parser.add_argument_group(GROUPS[knob.name])
        if phase in knob.metadata["phases"]:
            flag = "--" + (knob.metadata["flag"] or knob.name).replace("_", "-")
            group.add_argument(flag, dest=knob.name, **_argument(knob))
    values = vars(parser.parse_args(argv))
    paths = values.pop("paths", [])
    return Config(**values), paths


def _argument(knob: Field[Any]) -> dict[str, Any]:
    """What argparse must know of a knob."""
    default, about = knob.default, knob.metadata
    help_text = about["help"].replace("%", "%%")
    if isinstance(default, bool):
        return {"action": "store_true", "help": help_text}
    shown = "" if default in (None, "", ()) else f" (default: {default})"
    return {
        "nargs": "+" if default == () else None,
        "type": _reader(knob),
        "default": default,
        "choices": about["choices"],
        "metavar": None if about["choices"] else (about["flag"] or knob.name).upper(),
        "help": help_text + shown,
    }


def _reader(knob: Field[Any]) -> Callable[[str], Any]:
    """Turns a flag's text into its value; argparse names the flag where it can't."""
    kind: Any = Path if knob.default in (None, ()) else type(knob.default)
    about = knob.metadata

    def read(text: str) -> Any:
        value = kind(text)
        if kind in (int, float) and not about["least"] <= value <= about["most"]:
            limits = f"at least {about['least']:.10g}, at most {about['most']:.10g}"
            raise argparse.ArgumentTypeError(f"must be {limits}")  # nor NaN
        if kind is str and not re.fullmatch(about["form"], text):
            raise argparse.ArgumentTypeError(f"{text!r} is not valid: {about['help']}")
        if knob.name in ("vlm", "embed_model"):
            return text.removesuffix(":latest")  # as if no tag were named
        return value

    names = {int: "whole number", float: "number"}
    read.__name__ = names.get(kind, kind.__name__)
    return read
