"""Floors beside a model: what simple things predict of the same targets, and how well.

- ``train_rate``: the label rate of train, the same for all;
- ``item_rate``: the item's label rate in train;
- ``user_rate``: the user's label rate before the request;
- ``regression``: a logistic regression on these two rates, the logarithms of the counts that they
  are of, and the label rate of the user's last n interactions.

A rate of few interactions is drawn to that of train, as if so many more of it had been seen as
predicts the targets of train best. All of it is learned from train alone. Predictions for a split
are kept in the run's folder, for the next evaluation of the same data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from dti_dist.console import say
from dti_dist.data.dataset import SPLITS, Dataset
from dti_dist.data.samples import SampleSettings
from dti_dist.errors import UserError
from dti_dist.evaluation.bootstrap import Groups, differences, draw, read_groups
from dti_dist.evaluation.counts import COLUMNS, COUNTED, count_before
from dti_dist.evaluation.labels import FLOORS
from dti_dist.evaluation.metrics import Sums, curve_query, measure, rows, sql_errors, sums_query
from dti_dist.evaluation.request_metrics import REQUEST_METRICS, measure_requests
from dti_dist.files import replacing
from dti_dist.sql import parquet, stream

MEASURED = ("auc", "log_loss", "ne", *REQUEST_METRICS)
"""Of each floor, those by request where there are requests."""

_FORMAT = 1  # raise when what floors are, or how they are stored, changes
_ABOUT = b"dti_dist"
_PRIORS = (1, 3, 10, 30, 100, 300, 1_000)  # interactions
_MOST_FITTED = 1_000_000  # targets: enough for six numbers, and held in memory
_TARGETS_AT_A_TIME = 1 << 20

Floats = npt.NDArray[np.float64]

_SCHEMA = pa.schema(
    [("row", pa.int64()), ("position", pa.int32()), *((name, pa.float32()) for name in FLOORS)]
)


@dataclass(frozen=True)
class Fit:
    """What floors have learned from targets of train.

    Attributes:
        targets: how many; rate: their label rate.
        priors: of each of COUNTED, how many interactions of label rate `rate` are added to those
            that were counted.
        weights: of the regression, by name of the feature; intercept: its constant.
    """

    targets: int
    rate: float
    priors: dict[str, int]
    weights: dict[str, float]
    intercept: float

    @staticmethod
    def to(counts: Mapping[str, np.ndarray]) -> Fit:
        """Fit to columns of the table ``counts``, among which both labels occur."""
        from sklearn.linear_model import LogisticRegression  # slow to import

        labels = counts["label"]
        rate = float(labels.mean())
        priors = {
            name: min(
                _PRIORS, key=lambda prior: _log_loss(labels, _rate(counts, name, rate, prior))
            )
            for name in COUNTED
        }
        features = _features(counts, rate, priors)
        model = LogisticRegression(solver="newton-cholesky").fit(
            np.column_stack(list(features.values())), labels
        )
        weights = dict(zip(features, model.coef_[0].tolist(), strict=True))
        return Fit(len(labels), rate, priors, weights, float(model.intercept_[0]))

    def predict(self, counts: Mapping[str, np.ndarray]) -> dict[str, Floats]:
        """[targets] probabilities by FLOORS, of columns of the table ``counts``."""
        features = _features(counts, self.rate, self.priors)
        logit = np.full(len(features["item_rate"]), self.intercept)
        for name, values in features.items():
            logit += self.weights[name] * values
        return {
            "train_rate": np.full(len(logit), self.rate),
            **{f"{name}_rate": _rate(counts, name, self.rate, self.priors[name])
               for name in ("item", "user")},
            "regression": 1 / (1 + np.exp(-logit)),
        }  # fmt: skip


def _features(
    counts: Mapping[str, np.ndarray], rate: float, priors: Mapping[str, int]
) -> dict[str, Floats]:
    """[targets] each: the logits of the three rates, the logarithms of 1 + two counts."""
    rates = {name: _rate(counts, name, rate, priors[name]) for name in COUNTED}
    return {
        **{f"{name}_rate": np.log(p / (1 - p)) for name, p in rates.items()},
        **{f"{name}_count": np.log1p(counts[f"{name}_count"]) for name in ("item", "user")},
    }


def _rate(counts: Mapping[str, np.ndarray], name: str, rate: float, prior: int) -> Floats:
    return (counts[f"{name}_clicks"] + prior * rate) / (counts[f"{name}_count"] + prior)


def _log_loss(labels: np.ndarray, probabilities: Floats) -> float:
    return -float(np.mean(np.log(np.where(labels == 1, probabilities, 1 - probabilities))))


@dataclass(frozen=True)
class Floors:
    """A file with row, position and FLOORS of each target of a split, and where they are from."""

    file: Path
    fit: Fit

    @property
    def more(self) -> str:
        """SQL of the columns FLOORS for predictions_file.load_targets."""
        return "".join(f", floors.{name}" for name in FLOORS)

    @property
    def joins(self) -> str:
        return f" LEFT JOIN {parquet([str(self.file)])} AS floors USING (row, position)"

    def measure(
        self, connection: duckdb.DuckDBPyConnection, by_request: bool
    ) -> MeasuredFloors | None:
        """Of the table ``targets`` with these columns. Makes the tables of metrics.measure anew.

        Returns:
            None, and says so, where the floors of some targets are not known.
        """
        (counts,) = rows(connection, "SELECT count(*) - count(regression) AS unknown FROM targets")
        if counts["unknown"]:
            say(f"no floors: {counts['unknown']:,} targets could not be read again")
            return None
        measured: dict[str, dict[str, Any]] = {}
        for name in FLOORS:
            targets = f"(SELECT * REPLACE ({name} AS probability) FROM targets)"
            with sql_errors(f"measuring {name}"):
                (sums,) = rows(connection, sums_query(f"({curve_query(targets)})"))
            found = Sums(**sums).figures()
            if by_request:
                found |= measure_requests(connection, targets)
            measured[name] = {key: found[key] for key in MEASURED if key in found}
        figures = measure(connection, targets) | measured["regression"]
        groups = read_groups(connection, targets, figures["users"], by_request=by_request)
        return MeasuredFloors(measured, self.fit, (figures, groups))


@dataclass(frozen=True)
class MeasuredFloors:
    """MEASURED by FLOORS, and the regression's figures and groups."""

    measured: dict[str, dict[str, Any]]
    fit: Fit
    regression: tuple[dict[str, Any], Groups]

    def beside(
        self, figures: Mapping[str, Any], groups: Groups, drawn: npt.NDArray[np.integer] | None
    ) -> dict[str, Any]:
        """What evaluate's figures hold of floors: ``floors``, ``floors_fit``, and of each metric
        ``model_minus_regression`` with its interval, where groups of users are `drawn`."""
        if drawn is None:
            drawn = draw(len(groups), resamples=0)
        found = differences(self.regression, (figures, groups), drawn)
        return {
            "floors": self.measured,
            "floors_fit": asdict(self.fit),
            "model_minus_regression": {name: asdict(found[name]) for name in found},
        }


def find_floors(
    connection: duckdb.DuckDBPyConnection,
    folder: Path,
    scratch: Path,
    dataset: Dataset,
    split: str,
    settings: SampleSettings,
    skip_bad: bool = False,
) -> Floors | None:
    """The floors of a split: those that `folder` keeps of the same data, or new ones.

    Args:
        scratch: on the same file system, for files on their way.
        settings: which interactions are targets, and n.
        skip_bad: pass over what can't be read. Then what was found is not kept.

    Returns:
        None, and says why, where the targets of train have not both labels.

    Raises:
        UserError: where the file can't be written, or DuckDB runs out of memory or disk.
    """
    file = folder / f"{split}.floors.parquet"
    fingerprint = _fingerprint(dataset, split, settings)
    if (fit := _kept(file, fingerprint)) is not None:
        return Floors(file, fit)
    say("fitting floors: what simple counts predict of the same targets")
    whole = count_before(connection, dataset, split, settings, skip_bad)
    with sql_errors("fitting floors"):
        fitted = _fitted(connection)
        fit = Fit.to(fitted) if len(np.unique(fitted["label"])) == 2 else None
        if fit:
            if not whole:
                file = scratch / file.name
            _write(connection, split, fit, fingerprint, file, scratch)
        connection.execute("DROP TABLE counts")
    if fit is None:
        say("no floors: the targets of train have not both labels")
        return None
    return Floors(file, fit)


def _kept(file: Path, fingerprint: str) -> Fit | None:
    """The fit of a file that is there, if it is of the same data and settings."""
    try:
        about = json.loads((pq.read_schema(file).metadata or {})[_ABOUT])
        return Fit(**about["fit"]) if about["fingerprint"] == fingerprint else None
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError):
        return None


def _fingerprint(dataset: Dataset, split: str, settings: SampleSettings) -> str:
    files = [(part.path, part.sha256) for name in SPLITS for part in dataset.parts(name)]
    requests = dataset.has_requests
    about = [_FORMAT, split, settings.n, settings.min_context, requests, files]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _fitted(connection: duckdb.DuckDBPyConnection) -> dict[str, np.ndarray]:
    """Columns of the targets of train: of all, or of users drawn at random if they are too many."""
    (found,) = rows(connection, "SELECT count(*) AS targets FROM counts WHERE split = 'train'")
    share = min(1.0, _MOST_FITTED / max(found["targets"], 1))
    return connection.sql(
        f"SELECT label, {', '.join(COLUMNS)} FROM counts WHERE split = 'train' "
        f"AND md5_number(user_id) % 1000000 < {round(share * 1_000_000)} ORDER BY row, position"
    ).fetchnumpy()


def _write(
    connection: duckdb.DuckDBPyConnection,
    split: str,
    fit: Fit,
    fingerprint: str,
    file: Path,
    scratch: Path,
) -> None:
    about = json.dumps({"fingerprint": fingerprint, "fit": asdict(fit)})
    schema = _SCHEMA.with_metadata({_ABOUT: about.encode()})
    found = stream(
        connection,
        f"SELECT row, position, {', '.join(COLUMNS)} FROM counts WHERE split = '{split}' "
        "ORDER BY row, position",
        _TARGETS_AT_A_TIME,
    )
    try:
        with (
            replacing(file, staging_folder=scratch) as staging,
            pq.ParquetWriter(staging, schema, compression="zstd") as writer,
        ):
            for batch in found:
                columns = {name: batch[name].to_numpy() for name in batch.schema.names}
                places = {name: columns[name] for name in ("row", "position")}
                writer.write_table(pa.table(places | fit.predict(columns)).cast(schema))
    except OSError as error:
        raise UserError(
            f"{file} can't be written: {error.strerror or error}. Free some space there, or leave "
            "floors out: --no-floor."
        ) from error
