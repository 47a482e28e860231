"""The image-text loss equals its formula, in value and gradient; test_contract.py compares its forms."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import run_ranks

from gkl_vl.losses.image_text import image_text_loss, mimicry_loss

# Relative tolerances against the fp64 reference. fp32: logits of up to 20 have errors of 20 * 6e-8 each, which the
# exponential of the soft targets amplifies; bf16 inputs are rounded to 8 bits before anything is computed, for both
# sides (the reference gets the rounded numbers), so that the remaining error is that of fp32.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-5}
ALL_WEIGHTS = {"contrastive_weight": 0.7, "soft_ce_weight": 1.3, "wmse_weight": 0.11, "kl_weight": 0.4}
TEMPERATURES = {"temperature": 2.0, "weight_temperature": 3.0}
ALONE = dict.fromkeys(("teacher_image", "teacher_text", "teacher_logit_scale"))
"""Without a teacher."""


def reference(
    *, image, text, scale, teacher_image, teacher_text, teacher_scale, ids, gamma, bias=0.0, weights=ALL_WEIGHTS,
    temperature=1.0, weight_temperature=1.0,
):  # fmt: skip
    """The formulas of the docstring, with the [n, m, m] tensor of the released code for wMSE.

    `text` and `teacher_text` are [n, d] or [n, k, d], `ids` a list for each image.
    """
    total = 0.0
    text, teacher_text = text.flatten(0, -2), teacher_text.flatten(0, -2)
    positive = [[caption in own for own in ids] for of_image in ids for caption in of_image]  # texts, images
    for a, b, teacher_a, teacher_b, positives in (
        (image, text, teacher_image, teacher_text, list(zip(*positive, strict=True))),
        (text, image, teacher_text, teacher_image, positive),
    ):
        s, t = scale * a @ b.T + bias, teacher_scale * teacher_a @ teacher_b.T
        n = len(s)
        contrastive = 0.0
        for i in range(n):
            same = [j for j, is_positive in enumerate(positives[i]) if is_positive]
            contrastive -= sum(torch.log_softmax(s[i], 0)[j] for j in same) / len(same) / n
        soft = F.softmax(t / temperature, 1)
        log_s = F.log_softmax(s / temperature, 1)
        soft_ce = -(soft * log_s).sum() / n
        kl = F.kl_div(log_s, soft, reduction="batchmean")
        w = F.softmax(t / weight_temperature, 1) ** gamma
        pairs = w[:, :, None] * w[:, None, :]
        difference = (t[:, :, None] - t[:, None, :]) - (s[:, :, None] - s[:, None, :])
        wmse = 0.25 * (pairs * difference**2).sum() / (w.sum(1) ** 2).sum()
        parts = {"contrastive": contrastive, "soft_ce": soft_ce, "wmse": wmse, "kl": kl}
        total = total + 0.5 * sum(weights[f"{name}_weight"] * part for name, part in parts.items())
    return total


def embeddings(n, d, seed, dtype=torch.float64):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def batch(n, dtype=torch.float64, d=5, e=7, captions=None):
    """Random normalised embeddings of student and teacher; with `captions` so many texts of each image."""
    names = ("image", "text", "teacher_image", "teacher_text")
    rows = {name: n if captions is None or "image" in name else n * captions for name in names}
    drawn = {name: embeddings(rows[name], d if i < 2 else e, seed=i, dtype=dtype) for i, name in enumerate(names)}
    return {name: x if rows[name] == n else x.view(n, captions, -1) for name, x in drawn.items()}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gamma", [0, 0.5, 1])
@pytest.mark.parametrize(
    "captions, ids",
    [
        (None, [[0]]),
        (None, [[0], [1], [0], [2], [1]]),  # equal captions of two images
        (None, [[i] for i in range(7)]),
        (2, [[0, 1], [2, 0], [3, 3], [4, 5]]),  # of two images, and of one
        (3, [[4, 8, 2], [7, 1, 0]]),
    ],
)
def test_the_loss_equals_its_formula_in_value_and_gradient(captions, ids, gamma, dtype):
    tensors = batch(len(ids), dtype, captions=captions)
    # scale and bias are parameters: at least fp32, also with embeddings in half precision
    scalar_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    scale, bias = torch.tensor(9.0, dtype=scalar_dtype), torch.tensor(-3.0, dtype=scalar_dtype)
    ours = [x.clone().requires_grad_() for x in (tensors["image"], tensors["text"], scale, bias)]
    exact = [x.detach().double().requires_grad_() for x in ours]
    loss, _ = image_text_loss(
        image=ours[0],
        text=ours[1],
        logit_scale=ours[2],
        logit_bias=ours[3],
        teacher_image=tensors["teacher_image"],
        teacher_text=tensors["teacher_text"],
        teacher_logit_scale=torch.tensor(13.0, dtype=scalar_dtype),
        teacher_logit_bias=torch.tensor(5.0, dtype=scalar_dtype),
        text_ids=torch.tensor(ids)[:, 0] if captions is None else torch.tensor(ids),
        gamma=gamma,
        **ALL_WEIGHTS,
        **TEMPERATURES,
    )
    expected = reference(
        image=exact[0],
        text=exact[1],
        scale=exact[2],
        bias=exact[3],
        teacher_image=tensors["teacher_image"].double(),
        teacher_text=tensors["teacher_text"].double(),
        teacher_scale=13.0,
        ids=ids,
        gamma=gamma,
        **TEMPERATURES,
    )
    # the loss is not the last operation: its upstream gradient is 3
    (3 * loss).backward()
    (3 * expected).backward()
    rtol = TOLERANCE[dtype]
    assert loss.item() == pytest.approx(expected.item(), rel=rtol, abs=rtol)
    for got, want in zip(ours, exact, strict=True):
        # bf16 embeddings have bf16 gradients: half a unit in the last place of 8 bits
        allowed = 4e-3 if got.dtype == torch.bfloat16 else rtol
        largest = max(want.grad.abs().max().item(), 1.0)
        torch.testing.assert_close(got.grad.double(), want.grad, rtol=allowed, atol=allowed * largest)


@pytest.mark.parametrize("teacher_sigmoid", [True, False])
@pytest.mark.parametrize("captions", [1, 2])
def test_the_sigmoid_form_equals_its_formula(teacher_sigmoid, captions):
    ids = [[0, 6], [1, 7], [0, 8], [2, 2], [1, 9]]
    tensors, n, m, temperature = batch(5, captions=captions), 5, 5 * captions, 2.0
    scale, bias = torch.tensor(9.0, dtype=torch.float64), torch.tensor(-3.0, dtype=torch.float64)
    s = scale * tensors["image"] @ tensors["text"].flatten(0, -2).T + bias
    t = 13.0 * tensors["teacher_image"] @ tensors["teacher_text"].flatten(0, -2).T + (5.0 if teacher_sigmoid else 0.0)
    contrastive = soft_ce = 0.0
    for i in range(n):
        for j in range(m):
            of_image = ids[j // captions][j % captions] in ids[i][:captions]
            contrastive -= F.logsigmoid(s[i, j] if of_image else -s[i, j]) / m
            by_row, by_column = F.softmax(t[i] / temperature, 0)[j], F.softmax(t[:, j] / temperature, 0)[i]
            p = torch.sigmoid(t[i, j] / temperature) if teacher_sigmoid else (by_row + by_column) / 2
            yes, no = F.logsigmoid(s[i, j] / temperature), F.logsigmoid(-s[i, j] / temperature)
            soft_ce -= (p * yes + (1 - p) * no) / m
    _, scalars = image_text_loss(
        **tensors,
        logit_scale=scale,
        logit_bias=bias,
        teacher_logit_scale=torch.tensor(13.0, dtype=torch.float64),
        teacher_logit_bias=torch.tensor(5.0, dtype=torch.float64),
        text_ids=torch.tensor(ids)[:, :captions],
        temperature=temperature,
        sigmoid=True,
        teacher_sigmoid=teacher_sigmoid,
    )
    assert scalars["contrastive"].item() == pytest.approx(contrastive.item(), rel=1e-6)
    assert scalars["soft_ce"].item() == pytest.approx(soft_ce.item(), rel=1e-6)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_the_targets_of_several_teachers_are_averaged(sigmoid):
    """Soft CE with the mean of the teachers' probabilities, wMSE with their mean logits, in value and gradient."""
    first, second, n = batch(6), batch(6, e=3), 6
    image, text = (first[name].clone().requires_grad_() for name in ("image", "text"))
    scales, weights, gamma = [13.0, 5.0], [0.75, 0.25], 0.5
    s, soft_ce, wmse = 9.0 * image @ text.T, 0.0, 0.0
    own = [(0, first["teacher_image"], first["teacher_text"]), (1, second["teacher_image"], second["teacher_text"])]
    logits = [scales[k] * images @ texts.T for k, images, texts in own]
    for s_rows, t_rows in ((s, logits), (s.T, [t.T for t in logits])):
        p = sum(w * (torch.sigmoid(t) if sigmoid else F.softmax(t, 1)) for w, t in zip(weights, t_rows, strict=True))
        cross = -(p * F.logsigmoid(s_rows) + (1 - p) * F.logsigmoid(-s_rows)) if sigmoid else -p * s_rows.log_softmax(1)
        soft_ce = soft_ce + cross.sum() / n / 2
        t = sum(w * t for w, t in zip(weights, t_rows, strict=True))
        base, d = F.softmax(t, 1) ** gamma, t - s_rows
        squares = base[:, :, None] * base[:, None, :] * (d[:, :, None] - d[:, None, :]) ** 2
        wmse = wmse + 0.25 * squares.sum() / (base.sum(1) ** 2).sum() / 2
    (soft_ce + 0.3 * wmse).backward()
    ours = [first[name].clone().requires_grad_() for name in ("image", "text")]
    loss, scalars = image_text_loss(
        image=ours[0],
        text=ours[1],
        logit_scale=torch.tensor(9.0, dtype=torch.float64),
        teacher_image=[images for _, images, _ in own],
        teacher_text=[texts for _, _, texts in own],
        teacher_logit_scale=[torch.tensor(scale, dtype=torch.float64) for scale in scales],
        teacher_weights=[3, 1],
        contrastive_weight=0.0,
        wmse_weight=0.3,
        gamma=gamma,
        sigmoid=sigmoid,
        teacher_sigmoid=sigmoid,
    )
    loss.backward()
    assert loss.item() == pytest.approx((soft_ce + 0.3 * wmse).item(), rel=1e-10)
    for got, want in zip(ours, (image, text), strict=True):
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-10, atol=1e-10)
    mean = 0.75 * scalars["soft_ce.0"] + 0.25 * scalars["soft_ce.1"]
    assert mean.item() == pytest.approx(soft_ce.item(), rel=1e-6)
    assert scalars["wmse"].item() == pytest.approx(wmse.item(), rel=1e-6)
    for k, t in enumerate(logits):
        assert scalars[f"agreement@1.{k}"].item() == pytest.approx((s.argmax(1) == t.argmax(1)).double().mean().item())
        entropy = -(t.softmax(1) * t.log_softmax(1)).sum(1).mean().item()
        assert scalars[f"teacher_entropy.{k}"].item() == pytest.approx(entropy, rel=1e-6)
        assert scalars[f"teacher_logit_scale.{k}"] == scales[k]


def test_without_ids_all_captions_differ():
    tensors = batch(6)
    arguments = tensors | {"logit_scale": torch.tensor(9.0), "teacher_logit_scale": torch.tensor(13.0)}
    without, _ = image_text_loss(**arguments)
    with_ids, _ = image_text_loss(**arguments, text_ids=torch.tensor([4, 9, 1, 7, 3, 2]))
    assert without.item() == with_ids.item()


def test_equal_captions_are_not_negatives():
    image, text = torch.eye(3), torch.eye(3)[[0, 0, 2]]
    loss, _ = image_text_loss(image=image, text=text, logit_scale=torch.tensor(1.0), text_ids=torch.tensor([8, 8, 5]))
    # the target of images 0 and 1 is captions 0 and 1, half each: -(1 + 1) / 2 + log(2e + 1), -(0 + 0) / 2 + log 3;
    # image 2: -1 + log(2 + e)
    rows = [-1 + math.log(2 * math.e + 1), math.log(3), -1 + math.log(2 + math.e)]
    # the target of captions 0 and 1 is images 0 and 1, half each: -(1 + 0) / 2 + log(e + 2), twice;
    # caption 2: -1 + log(2 + e)
    columns = [-0.5 + math.log(math.e + 2)] * 2 + [-1 + math.log(math.e + 2)]
    assert loss.item() == pytest.approx((sum(rows) / 3 + sum(columns) / 3) / 2, rel=1e-6)


def test_the_captions_of_an_image_are_its_positives_and_not_each_others_negatives():
    image, text = torch.eye(2), torch.eye(2)[torch.tensor([[0, 0], [1, 0]])]  # the second caption of image 1 is off
    loss, _ = image_text_loss(image=image, text=text, logit_scale=torch.tensor(1.0))
    # image 0: captions 1 1 0 1; image 1: 0 0 1 0, half each on the last two
    rows = [-1 + math.log(3 * math.e + 1), -0.5 + math.log(3 + math.e)]
    # captions 0, 1, 2 match their image; caption 3 the other one
    columns = [-1 + math.log(math.e + 1)] * 3 + [math.log(math.e + 1)]
    assert loss.item() == pytest.approx((sum(rows) / 2 + sum(columns) / 4) / 2, rel=1e-6)


def test_a_bias_cancels_and_still_has_a_gradient():
    tensors = batch(4)
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-10.0, dtype=torch.float64, requires_grad=True)
    arguments = tensors | {"teacher_logit_scale": torch.tensor(13.0)}
    loss, _ = image_text_loss(**arguments, logit_scale=scale, logit_bias=bias)
    plain, _ = image_text_loss(**arguments, logit_scale=scale)
    assert loss.item() == pytest.approx(plain.item(), rel=1e-12)
    loss.backward()
    assert bias.grad is not None and abs(bias.grad.item()) < 1e-12
    assert scale.grad.abs() > 0


def test_mimicry_is_the_mean_squared_error_of_both_towers():
    a, b, c, d = (embeddings(3, 4, seed=i) for i in range(4))
    expected = ((a - c) ** 2).sum() / 12 + ((b - d) ** 2).sum() / 12
    loss = mimicry_loss(image=a, text=b, teacher_image=c, teacher_text=d)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_scalars_describe_student_and_teacher():
    image = text = torch.eye(3)
    teacher_text = torch.eye(3)[[1, 0, 2]]  # the teacher swaps captions 0 and 1
    _, scalars = image_text_loss(
        image=image,
        text=text,
        logit_scale=torch.tensor(50.0),
        teacher_image=image,
        teacher_text=teacher_text,
        teacher_logit_scale=torch.tensor(0.0),
    )
    assert scalars["batch_acc1"].item() == 1
    assert scalars["student_entropy"].item() == pytest.approx(0, abs=1e-6)
    assert scalars["teacher_entropy"].item() == pytest.approx(math.log(3))
    assert scalars["logit_scale"].item() == 50 and scalars["teacher_logit_scale"].item() == 0
    assert not any(value.requires_grad for value in scalars.values())
    sharp = {"teacher_image": image, "teacher_text": teacher_text, "teacher_logit_scale": torch.tensor(20.0)}
    _, scalars = image_text_loss(image=image, text=text, logit_scale=torch.tensor(50.0), **sharp)
    assert scalars["agreement@1"].item() == pytest.approx(1 / 3)


def test_a_callers_autocast_changes_no_logit():
    scales = {"logit_scale": torch.tensor(50.0), "teacher_logit_scale": torch.tensor(80.0)}
    plain, _ = image_text_loss(**batch(5, torch.float32), **scales)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under, _ = image_text_loss(**batch(5, torch.float32), **scales)
    assert under.dtype == torch.float32 and under.item() == pytest.approx(plain.item(), rel=1e-6)


def test_a_term_without_weight_is_not_computed():
    _, scalars = image_text_loss(
        **batch(3), logit_scale=torch.tensor(1.0), teacher_logit_scale=torch.tensor(1.0), wmse_weight=0
    )
    assert {"contrastive", "soft_ce"} <= set(scalars) and not {"wmse", "kl", "mimicry"} & set(scalars)


def test_with_all_weights_0_the_scalars_are_computed_and_every_parameter_is_in_the_graph():
    weights = {"contrastive_weight": 0, "soft_ce_weight": 0, "wmse_weight": 0}
    scale, bias = torch.tensor(5.0, requires_grad=True), torch.tensor(-1.0, requires_grad=True)
    loss, scalars = image_text_loss(
        **batch(3), logit_scale=scale, logit_bias=bias, teacher_logit_scale=torch.tensor(1.0), **weights
    )
    loss.backward()
    assert loss.item() == 0 and scale.grad == 0 and bias.grad == 0
    assert "agreement@1" in scalars and not {"contrastive", "soft_ce", "wmse"} & set(scalars)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"teacher_image": torch.eye(2)}, "teacher_image has 2 rows, image has 3"),
        ({"text": torch.eye(3)[:2]}, "text has 2 rows"),
        ({"text_ids": torch.arange(4)}, "text_ids has 4 rows"),
        ({"text": torch.eye(3)[:, None].expand(3, 2, 3)}, "teacher_text has 3 rows, text has 6"),
        ({"text_ids": torch.zeros(3, 2, dtype=torch.long)}, "text_ids has 6 rows, text has 3"),
        ({"teacher_text": torch.eye(3)[:, None].expand(3, 2, 3)}, "teacher_text has 6 rows, text has 3"),
        ({"teacher_text": None}, "must be given together: pass all three or none"),
        (ALONE | {"text": torch.eye(3)[:2]}, "text has 2 rows"),
        (ALONE | {"text_ids": torch.arange(4)}, "text_ids has 4 rows"),
        ({"teacher_sigmoid": True}, "teacher_sigmoid=True needs sigmoid=True"),
        ({"teacher_image": [torch.eye(3)] * 2}, "teacher_text is of 1 teachers, teacher_image of 2"),
        ({"teacher_weights": [1, 1]}, "teacher_weights is of 2 teachers, teacher_image of 1"),
        ({"teacher_weights": [0]}, "teacher_weights must be a finite number > 0, got 0"),
        ({"sigmoid": True, "kl_weight": 0.5}, "kl_weight=0.5 has no meaning with sigmoid=True"),
        ({"gamma": -1}, "gamma must be a finite number >= 0, got -1"),
        ({"temperature": 0}, "temperature must be a finite number > 0, got 0"),
    ],
)
def test_errors_name_what_is_wrong(change, message):
    eye, scale = torch.eye(3), torch.tensor(1.0)
    arguments = {"image": eye, "text": eye, "teacher_image": eye, "teacher_text": eye}
    arguments |= {"logit_scale": scale, "teacher_logit_scale": scale}
    with pytest.raises(ValueError, match=message):
        image_text_loss(**(arguments | change))


# ---- several processes -------------------------------------------------------------------------------------------


def scalars_of_four_pairs(rank, world_size):
    """The student matches images 0 to 2; caption 2 occurs twice, image 3 has no match. The teacher swaps 0 and 1."""
    own = slice(rank * 4 // world_size, (rank + 1) * 4 // world_size)
    image, text, teacher_text = torch.eye(4), torch.eye(4)[[0, 1, 2, 2]], torch.eye(4)[[1, 0, 2, 3]]
    _, scalars = image_text_loss(
        image=image[own],
        text=text[own],
        logit_scale=torch.tensor(50.0),
        teacher_image=image[own],
        teacher_text=teacher_text[own],
        teacher_logit_scale=torch.tensor(100.0),
    )
    return {name: value.item() for name, value in scalars.items()}


def test_scalars_of_two_ranks_are_those_of_the_whole_batch():
    for scalars in [scalars_of_four_pairs(0, 1), *run_ranks(scalars_of_four_pairs, 2)]:
        assert scalars["batch_acc1"] == 0.75
        assert scalars["agreement@1"] == 0.25  # image 2 only
        # image 2 has two equally similar captions, image 3 four
        assert scalars["student_entropy"] == pytest.approx((math.log(2) + math.log(4)) / 4, rel=1e-5)
        assert scalars["teacher_entropy"] == pytest.approx(0, abs=1e-6)
        assert (scalars["logit_scale"], scalars["teacher_logit_scale"]) == (50, 100)
