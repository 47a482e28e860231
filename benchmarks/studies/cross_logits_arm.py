"""One run of the cross-logit study: `clip_kd.py` on the bundled data with further terms, in their plain dense form.

    python benchmarks/studies/cross_logits_arm.py --cross-soft-ce 2 --cross-wmse 6 --seed 20 --output-dir runs/x

The terms that only this study needs (rivals, other banks, the prior of caption clusters) live here and not in the
library. After the run results.jsonl has a record of the set "study" with what the recipe does not log: top-1 on the two
halves of the test drawings, with the student's and with the teacher's texts, and the divergence of the zero-shot
distributions of student and teacher.
Axis letters: n = rows, K = columns, e = the teacher's embedding, c = clusters.
"""

import zlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from bundled import BundledEmbeddings, bundled_embeddings
from torch import Tensor, nn

from gkl_vl import cli
from gkl_vl.data.pairs import bundled_pairs
from gkl_vl.data.prompts import bundled_prompts
from gkl_vl.evaluation.embed import Embedder, embed_images, zero_shot_classifier
from gkl_vl.evaluation.sets import BUNDLED, load_benchmark_set
from gkl_vl.models.clip import load_clip
from gkl_vl.models.modes import freeze
from gkl_vl.objectives.clip import ClipKd
from gkl_vl.protocols import Batch, Objective
from gkl_vl.teachers.bank import Bank
from gkl_vl.training.checkpoint import RunFolder
from gkl_vl.training.clip import (
    BANK_SIZE,
    CaptionData,
    CaptionLoss,
    ClipEvaluation,
    ClipOptimisation,
    ClipSetup,
    caption_objective,
    caption_weights,
    open_captions,
    train_clip,
)
from gkl_vl.training.clip_models import ClipModels, StudentFlags
from gkl_vl.training.run import RunFlags

BankKind = Literal["queue", "store", "names", "half", "keywords"]


@dataclass(frozen=True, kw_only=True)
class CrossTerms:
    """Weights of the terms on cross logits. Each term is the mean of the two directions."""

    cross_soft_ce: float = 0.0
    """Soft cross entropy at temperature 1."""
    cross_wmse: float = 0.0
    """1/2 the weighted variance of t - s."""
    cross_gamma: float = 0.5
    ratio: bool = False
    """The released ratio of sums, which weighs rows by W^2, in place of the mean over rows."""
    soft_ce_at_2: float = 0.0
    """Soft cross entropy at temperature 2; weight T^2 = 4 corresponds to wMSE 1 at gamma 1/2, to second order."""
    relational: float = 0.0
    """MSE of the distances of all pairs in the batch, of images and of texts."""
    correlation: float = 0.0
    """DIST: 1 - Pearson correlation of the probabilities, of rows and of columns."""
    prior: int = 0
    """wMSE's weight is the mean teacher softmax over so many clusters of captions; 0 = the row's own softmax."""
    bank: BankKind = "names"
    """The queue and the sample of the store have the recipe's size."""

    @property
    def active(self) -> bool:
        """Whether any term of this study has a weight."""
        weights = (self.cross_soft_ce, self.cross_wmse, self.soft_ce_at_2, self.relational, self.correlation)
        return any(weights)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Distil the bundled teacher with further terms on cross logits."""

    model: ClipModels = ClipModels()
    student: StudentFlags = StudentFlags()
    loss: CaptionLoss = CaptionLoss()
    cross: CrossTerms = CrossTerms()
    optimisation: ClipOptimisation = ClipOptimisation()
    run: RunFlags = RunFlags(workers=0)
    evaluation: ClipEvaluation = ClipEvaluation()


@dataclass(kw_only=True)
class CrossStudy(Objective):
    """`ClipKd` plus the terms of `CrossTerms`, dense, on one process."""

    base: ClipKd
    terms: CrossTerms
    banks: tuple[Tensor, Tensor] | Bank
    """Text and image columns [K, e], fixed or of the last pairs."""
    priors: tuple[Tensor, Tensor, Tensor] | None = None
    """Cluster centres [c, e], and the mean teacher softmax [c, K] of each for images and for texts."""

    def around_update(self, batches: list[Batch]) -> AbstractContextManager[None]:
        return self.base.around_update(batches)

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        return self.base.outputs(model, batch)

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        return self.base.targets(batch)

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        loss, scalars = self.base.loss(outputs, targets)
        if not self.terms.active:
            return loss, scalars
        banks, extra = self.banks, {}
        if isinstance(banks, Bank):
            queue, banks = banks, banks.columns(first_caption(targets["teacher_text"]), targets["teacher_image"])
            queue.advance()
        for name, columns in zip(("image", "text"), banks, strict=True):
            student, teacher = (
                outputs[f"mapped_{name}"].float().flatten(0, -2),
                targets[f"teacher_{name}"].flatten(0, -2),
            )
            for term, value in self.direction(student, teacher, columns, targets, name).items():
                extra[term] = extra.get(term, 0.0) + value / 2
        total = loss + sum(getattr(self.terms, term) * value for term, value in extra.items())
        return total, scalars | {f"x_{term}": value.detach() for term, value in extra.items()}

    def direction(
        self, student: Tensor, teacher: Tensor, columns: Tensor, targets: dict[str, Tensor], name: str
    ) -> dict[str, Tensor]:
        terms, scale = self.terms, targets["teacher_logit_scale"]
        s, t = scale * student @ columns.T, scale * teacher @ columns.T
        values = {}
        if terms.cross_soft_ce:
            values["cross_soft_ce"] = F.cross_entropy(s, t.softmax(1))
        if terms.soft_ce_at_2:
            values["soft_ce_at_2"] = F.cross_entropy(s / 2, (t / 2).softmax(1))
        if terms.cross_wmse:
            weight = (terms.cross_gamma * t).softmax(1)
            if self.priors is not None:
                centres, of_images, of_texts = self.priors
                texts = targets["teacher_text"]
                texts = first_caption(texts) if name == "image" else texts.flatten(0, -2)
                cluster = (texts @ centres.T).argmax(1)
                base = (of_images if name == "image" else of_texts)[cluster]
                weight = base**terms.cross_gamma
                weight = weight / weight.sum(1, keepdim=True)
            d = t - s
            rows = 0.5 * (weight * (d - (weight * d).sum(1, keepdim=True)).square()).sum(1)
            total = t.softmax(1).pow(terms.cross_gamma).sum(1).square()
            values["cross_wmse"] = (rows * total).sum() / total.sum() if terms.ratio else rows.mean()
        if terms.relational:
            values["relational"] = F.mse_loss(torch.cdist(student, student), torch.cdist(teacher, teacher))
        if terms.correlation:
            p, q = t.softmax(1), s.softmax(1)
            values["correlation"] = 2 - pearson(p, q).mean() - pearson(p.T, q.T).mean()
        return values


def first_caption(texts: Tensor) -> Tensor:
    """[n, e] of embeddings of one caption per image, or of several, [n, c, e]."""
    return texts if texts.ndim == 2 else texts[:, 0]


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Correlation of each row."""
    return F.cosine_similarity(x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True), dim=1)


# ---- banks -------------------------------------------------------------------------------------------------------


def make_banks(terms: CrossTerms, stored: BundledEmbeddings) -> tuple[Tensor, Tensor]:
    """Fixed text and image columns [K, e] from the stored embeddings of the teacher."""
    pairs = bundled_pairs()
    names = [pair.captions[0] for pair in pairs]
    distinct = sorted(set(names))
    by_text = {c: stored.text[p, i] for p, pair in enumerate(pairs) for i, c in enumerate(pair.captions)}
    images = stored.image.flatten(0, 1)
    if terms.bank == "store":
        draw = torch.Generator().manual_seed(0)
        texts = torch.stack(list(by_text.values()))
        texts, images = (x[torch.randperm(len(x), generator=draw)[:BANK_SIZE]] for x in (texts, images))
        return texts, images
    if terms.bank == "keywords":
        known = {*distinct, *(f"an emoji of {name}" for name in distinct)}
        return torch.stack([x for c, x in by_text.items() if c not in known]), images[::3]
    text_sum, image_sum = {}, {}
    for p, pair in enumerate(pairs):
        text_sum[names[p]] = text_sum.get(names[p], 0) + stored.text[p, : len(pair.captions)].sum(0)
        image_sum[names[p]] = image_sum.get(names[p], 0) + stored.image[p].sum(0)
    kept = [name for name in distinct if terms.bank == "names" or in_bank(name)]
    texts, images = (F.normalize(torch.stack([sums[name] for name in kept]), dim=1) for sums in (text_sum, image_sum))
    return texts, images


def in_bank(name: str) -> bool:
    """Whether a concept belongs to the half that the bank `half` holds."""
    return zlib.crc32(name.encode()) % 2 == 0


def make_priors(terms: CrossTerms, stored: BundledEmbeddings, banks: tuple[Tensor, Tensor], scale: Tensor) -> Any:
    """Spherical k-means of the names' texts, and the mean teacher softmax of each cluster over the two banks."""
    texts = stored.text[:, 0]
    centres = texts[torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[: terms.prior]]
    for _ in range(20):
        cluster = (texts @ centres.T).argmax(1)
        centres = F.normalize(centres.clone().index_reduce_(0, cluster, texts, "mean", include_self=True), dim=1)
    cluster = (texts @ centres.T).argmax(1)

    def mean(rows: Tensor, bank: Tensor) -> Tensor:
        p = (scale * rows @ bank.T).softmax(1)
        sums = p.new_zeros(terms.prior, p.shape[1]).index_add_(0, cluster, p)
        return sums / sums.sum(1, keepdim=True).clamp_min(1e-9) + 1e-12

    return centres, mean(stored.image[:, 0], banks[0]), mean(texts, banks[1])


def make_objective(config: Config, setup: ClipSetup, weights: Any) -> CrossStudy:
    (teacher,) = setup.teachers.clips
    stored = bundled_embeddings(teacher, setup.student)
    terms, priors = config.cross, None
    if terms.bank == "queue":
        banks = Bank(BANK_SIZE)
    else:
        texts, images = make_banks(terms, stored)
        if terms.prior:
            scale = teacher.towers.log_scale().exp().detach().cpu()
            centres, *means = make_priors(terms, stored, (texts, images), scale)
            priors = centres.to(setup.device), means[0].to(setup.device), means[1].to(setup.device)
        banks = texts.to(setup.device), images.to(setup.device)
    base = caption_objective(config.loss, weights)(setup)
    return CrossStudy(base=base, terms=terms, banks=banks, priors=priors)


# ---- what the recipe does not log ---------------------------------------------------------------------------------


@torch.inference_mode()
def measure(folder: Any) -> dict[str, float]:
    """Top-1 by half of the test drawings (even and odd positions), by half of the concepts, and the divergence."""
    prompts, dataset = bundled_prompts(), load_benchmark_set(BUNDLED[0])
    names = dataset.classnames
    assert names is not None  # the bundled set has them
    logits = {}
    embedded = {}
    for role, name in (("teacher", "bundled"), ("student", f"local-dir:{folder / 'model'}")):
        embedder = Embedder(clip=freeze(load_clip(name)), device=torch.device("cpu"), batch_size=256)
        classes = zero_shot_classifier(embedder, classnames=names, templates=prompts.templates)
        images = embed_images(embedder, dataset, "cls")
        image, labels = images.rows, torch.tensor(images.targets["cls"])
        embedded[role] = image, classes
        logits[role] = embedder.clip.towers.log_scale().exp() * image @ classes.T
    right = (logits["student"].argmax(1) == labels).double()
    with_teacher = (embedded["student"][0] @ embedded["teacher"][1].T).argmax(1) == labels
    log_p, log_q = (logits[role].double().log_softmax(1) for role in ("teacher", "student"))
    known = torch.tensor([in_bank(names[label]) for label in labels.tolist()])
    return {
        "acc1_a": right[::2].mean().item(),
        "acc1_b": right[1::2].mean().item(),
        "acc1_bank_half": right[known].mean().item(),
        "acc1_other_half": right[~known].mean().item(),
        "acc1_teacher_texts": with_teacher.double().mean().item(),
        "kl": (log_p.exp() * (log_p - log_q)).sum(1).mean().item(),
    }


def main(config: Config) -> None:
    data = open_captions(CaptionData(), distils=config.model.distils)
    weights = caption_weights(config.loss, distils=config.model.distils, bundled=True)
    train_clip(
        config,
        recipe="cross_logits",
        data=data,
        make_objective=lambda setup: make_objective(config, setup, weights),
        bundled_rates=(1.4e-2, 3e-3),
        mapped=("image", "text"),
    )
    folder = config.run.output_dir
    assert folder is not None  # given by the study
    steps = config.optimisation.steps
    RunFolder(folder, is_main=True).log({"step": steps, "model": "student", "dataset": "study"} | measure(folder))


if __name__ == "__main__":
    cli.run(main, Config)
