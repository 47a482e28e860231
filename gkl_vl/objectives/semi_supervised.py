"""Semi-supervised training of classifiers."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gkl_vl.losses.consistency import ClassThresholds, SemiSupervised, consistency_loss, pseudo_label_scalars, rampup
from gkl_vl.losses.gkl import upcast
from gkl_vl.losses.image_text import global_value, scalars_of_all_ranks
from gkl_vl.models.classifiers import Classifier
from gkl_vl.objectives.common import EpochPrior, accuracy
from gkl_vl.protocols import Batch, Objective


@dataclass(kw_only=True)
class SemiSupervisedTraining(Objective):
    """Cross entropy with the labels plus a consistency loss between strong and weak views of unlabelled images."""

    student: Classifier
    """Prepares the images; its model is trained."""
    average: AveragedModel | None
    """Mean Teacher: the moving average, with averaged BatchNorm statistics, for weak views. None = the model itself."""
    settings: SemiSupervised
    thresholds: ClassThresholds | None
    """FlexMatch's thresholds; None = one threshold for all classes."""
    prior: EpochPrior | None
    """Mean softmax over the images of each pseudo-label, of those in the mask."""

    def prepare(self, batch: Batch) -> Batch:
        """Adds `weak`, the logits of the weak views, and `mask`, where their pseudo-labels are used. All ranks."""
        if "weak" not in batch:
            return batch
        weak = self._weak(batch["weak"])
        confidence, labels = weak.softmax(dim=1).max(dim=1)
        mask = self._mask(batch, confidence, labels)
        batch = batch | {"weak": weak, "mask": mask}
        if self.prior is None:
            return batch
        rows = self.prior.rows(labels, epoch=batch["epoch"])  # all ranks
        self.prior.update(weak[mask], labels[mask])
        return batch | {"prior": rows}

    @torch.no_grad()
    def _weak(self, images: Tensor) -> Tensor:
        """Logits of the weak views, in a separate forward pass: no graph is kept for images without gradient."""
        pixels = self.student.prepare(images)
        if self.average is not None:
            return upcast(self.average.module.eval()(pixels))  # EMAN: Cai et al., CVPR 2021
        # Training mode, as for the strong views: BatchNorm uses the batch's statistics.
        return upcast(self.student.model.train()(pixels))

    def _mask(self, batch: Batch, confidence: Tensor, labels: Tensor) -> Tensor:
        if self.thresholds is None:
            return confidence >= self.settings.threshold
        mask = confidence >= self.thresholds.of(labels)
        index = batch["unlabelled_index"]
        self.thresholds.update(index=index, labels=labels, confidence=confidence)  # all ranks
        return mask

    def outputs(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """`labelled` logits [n, C] and `strong` logits [n, mu, C]: the training loop needs a row per labelled image."""
        if "strong" not in batch:
            return {"labelled": upcast(model(self.student.prepare(batch["image"])))}
        n = len(batch["label"])
        both = upcast(model(self.student.prepare(torch.cat([batch["image"], batch["strong"]]))))
        return {"labelled": both[:n], "strong": both[n:].unflatten(0, (n, -1))}

    def targets(self, batch: Batch) -> dict[str, Tensor]:
        """Labels, and the tensors that `prepare` added; hidden labels for the log only."""
        labels = batch["label"]
        if "strong" not in batch:
            return {"labels": labels}
        rows = {name: batch[name] for name in ("weak", "mask", "prior", "hidden_label") if name in batch}
        share = labels.new_tensor(rampup(self.settings, step=batch["step"]), dtype=torch.float)
        unlabelled = {name: x.unflatten(0, (len(labels), -1)) for name, x in rows.items()}
        return unlabelled | {"labels": labels, "share": share}

    def loss(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """CE(labelled) + unlabelled_weight * consistency. Equal on all ranks."""
        logits, labels = outputs["labelled"], targets["labels"]
        ce = F.cross_entropy(logits, labels)
        scalars = {"ce": ce.detach(), "batch_acc1": accuracy(logits, labels)}
        if "strong" not in outputs:
            return global_value(ce), scalars_of_all_ranks(scalars)
        strong, weak, mask, hidden = (
            tensors[name].flatten(0, 1)
            for tensors, name in ((outputs, "strong"), (targets, "weak"), (targets, "mask"), (targets, "hidden_label"))
        )
        prior = targets["prior"].flatten(0, 1) if "prior" in targets else None
        term = consistency_loss(strong=strong, weak=weak, mask=mask, prior=prior, settings=self.settings)
        loss = ce + targets["share"] * self.settings.unlabelled_weight * term
        scalars |= {"consistency": term.detach()} | pseudo_label_scalars(weak=weak, mask=mask, hidden=hidden)
        return global_value(loss), scalars_of_all_ranks(scalars)

    def state(self) -> dict[str, Tensor]:
        state = {} if self.prior is None else self.prior.state()
        return state if self.thresholds is None else state | {"last_pseudo_label": self.thresholds.last}

    def load_state(self, state: dict[str, Tensor]) -> None:
        if self.prior is not None:
            self.prior.load_state(state)
        if self.thresholds is not None:
            self.thresholds.last = state["last_pseudo_label"]
