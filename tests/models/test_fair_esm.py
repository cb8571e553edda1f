"""fair-esm's API against fair-esm itself: same tokens in, same numbers out on every valid row."""

import copy

import pytest
import torch
from fakes import SEQUENCES, fair_esm_model, save_fair_esm, trained_like

import esm_fast
from esm_fast.alphabet import MASK
from esm_fast.models.esm1 import Config

LONG = [("longest", "MKTAYIAKQR" * 102 + "GA"), ("short", "ACD<mask>F")]


def tokens_of(sequences):
    _, _, tokens = esm_fast.Alphabet.from_architecture("ESM-1b").get_batch_converter()(sequences)
    return tokens


def load(model, tmp_path, **options):
    return esm_fast.load(save_fair_esm(model, tmp_path / "tiny.pt"), **options)[0]


def assert_same(theirs, ours, tokens, tolerance=1e-4):
    """Logits, representations, attentions on valid rows; contacts on the residues' block."""
    valid = tokens != 1
    torch.testing.assert_close(ours["logits"][valid], theirs["logits"][valid], rtol=0, atol=tolerance)
    assert ours["representations"].keys() == theirs["representations"].keys()
    for layer, x in theirs["representations"].items():
        torch.testing.assert_close(ours["representations"][layer][valid], x[valid], rtol=0, atol=tolerance)
        assert not ours["representations"][layer][~valid].any()
    torch.testing.assert_close(ours["attentions"], theirs["attentions"], rtol=0, atol=tolerance)
    for i, residues in enumerate((valid.sum(1) - 2).tolist()):
        block = (i, slice(residues), slice(residues))
        torch.testing.assert_close(ours["contacts"][block], theirs["contacts"][block], rtol=0, atol=tolerance / 10)


@pytest.mark.parametrize("norm_before", [True, False], ids=["esm1b", "esm1v"])
@pytest.mark.parametrize("token_dropout", [True, False], ids=["token_dropout", "plain"])
@pytest.mark.parametrize("heads, head_dim", [(4, 8), (3, 20), (2, 64), (1, 128)])
def test_everything_equals_fair_esm(tmp_path, norm_before, token_dropout, heads, head_dim):
    theirs = fair_esm_model(
        heads + head_dim, heads=heads, head_dim=head_dim, norm_before=norm_before, token_dropout=token_dropout
    )
    ours = load(theirs, tmp_path)
    tokens = tokens_of(SEQUENCES)
    ask = dict(repr_layers=[3, 0, 2, 1], need_head_weights=True, return_contacts=True)
    with torch.no_grad():
        assert_same(theirs(tokens, **ask), ours(tokens, **ask), tokens)


def test_the_models_under_test_do_attend(fair_model):
    """Guards the tests themselves: with uniform attention most mistakes would pass."""
    with torch.no_grad():
        maps = fair_model(tokens_of(SEQUENCES[:1]), need_head_weights=True)["attentions"]
    entropy = -(maps * maps.clamp_min(1e-12).log()).sum(-1).mean()
    assert entropy < 0.8 * torch.tensor(maps.shape[-1]).float().log()


def test_longest_and_shortest(fair_model, tmp_path):
    ours, tokens = load(fair_model, tmp_path), tokens_of(LONG)
    assert tokens.shape[1] == 1024
    with torch.no_grad():
        ask = dict(repr_layers=[0, 3], need_head_weights=True, return_contacts=True)
        assert_same(fair_model(tokens, **ask), ours(tokens, **ask), tokens)


def test_fp64_shows_no_difference_but_rounding(fair_model, tmp_path):
    ours, theirs = load(fair_model, tmp_path, dtype="float64"), copy.deepcopy(fair_model).double()
    tokens = tokens_of([s for s in SEQUENCES if "<mask>" not in s[1]])  # fair-esm counts <mask> in fp32
    ask = dict(repr_layers=[0, 1, 2, 3], need_head_weights=True, return_contacts=True)
    with torch.no_grad():
        theirs_out = theirs(tokens, **ask)
        # fair-esm's attention maps and their sums are fp32 whatever the model is
        assert_same(theirs_out, ours(tokens, **ask), tokens, tolerance=1e-5)


def test_packed_equals_padded_equals_alone(fair_model, tmp_path):
    ours = load(fair_model, tmp_path)
    batch = tokens_of(SEQUENCES)
    with torch.no_grad():
        together = ours(batch, repr_layers=[3], return_contacts=True)
        for i, (label, sequence) in enumerate(SEQUENCES):
            tokens = tokens_of([(label, sequence)])
            alone = ours(tokens, repr_layers=[3], return_contacts=True)
            length = tokens.shape[1]
            torch.testing.assert_close(together["logits"][i, :length], alone["logits"][0], rtol=0, atol=1e-5)
            torch.testing.assert_close(
                together["contacts"][i, : length - 2, : length - 2], alone["contacts"][0], rtol=0, atol=1e-6
            )


def test_gradients_equal_fair_esms(fair_model, tmp_path):
    ours, theirs = load(fair_model, tmp_path), copy.deepcopy(fair_model)
    tokens = tokens_of(SEQUENCES)
    valid = tokens != 1
    projection = torch.randn(int(valid.sum()), 33, generator=torch.Generator().manual_seed(0))
    for model in (ours, theirs):
        (model(tokens)["logits"][valid] * projection).mean().backward()
    theirs_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        if "contact_head" in name:
            continue
        scale = theirs_grads[name].abs().max().clamp_min(1e-3)
        torch.testing.assert_close(parameter.grad / scale, theirs_grads[name] / scale, rtol=0, atol=1e-4, msg=name)


def test_contact_gradients_equal_fair_esms(fair_model, tmp_path):
    ours, theirs = load(fair_model, tmp_path), copy.deepcopy(fair_model)
    tokens = tokens_of(SEQUENCES[:1])
    for model in (ours, theirs):
        model.predict_contacts(tokens).square().sum().backward()
    wanted = dict(theirs.named_parameters())
    for name in ("contact_head.regression.weight", "contact_head.regression.bias", "layers.0.self_attn.q_proj.weight"):
        scale = wanted[name].grad.abs().max()
        ours_grad = ours.get_parameter(name).grad
        torch.testing.assert_close(ours_grad / scale, wanted[name].grad / scale, rtol=0, atol=1e-4)


def test_padding_in_the_middle_and_raw_tokens(fair_model, tmp_path):
    """fair-esm takes any integers: its own load test feeds [[0, 1, 2], [3, 4, 5]], with a <pad> inside."""
    ours = load(fair_model, tmp_path)
    tokens = torch.tensor([[0, 1, 2, 7], [3, 4, 5, 6], [0, 8, 1, 2]])
    ask = dict(repr_layers=[0, 2, 3], need_head_weights=True, return_contacts=True)
    with torch.no_grad():
        a, b = fair_model(tokens, **ask), ours(tokens, **ask)
    valid = tokens != 1
    torch.testing.assert_close(b["logits"][valid], a["logits"][valid], rtol=0, atol=1e-4)
    torch.testing.assert_close(b["attentions"], a["attentions"], rtol=0, atol=1e-4)
    # Where a row has no residue at all, fair-esm's contacts are 0 / 0.
    torch.testing.assert_close(b["contacts"][1], a["contacts"][1], rtol=0, atol=1e-5)
    assert torch.isfinite(b["contacts"]).all()
    assert ours(torch.tensor([[0, 1, 2], [3, 4, 5]]))["logits"].shape == (2, 3, 33)


def test_all_padding_rows_are_zero_not_nan(fair_model, tmp_path):
    out = load(fair_model, tmp_path)(torch.tensor([[0, 5, 2], [1, 1, 1]]), repr_layers=[3], need_head_weights=True)
    assert not out["logits"][1].any() and not out["attentions"][1].any()
    assert all(torch.isfinite(x).all() for x in (out["logits"], out["attentions"], out["representations"][3]))


def test_out_of_range_layers_are_ignored_as_fair_esm_does(fair_model, tmp_path):
    out = load(fair_model, tmp_path)(torch.tensor([[0, 5, 2]]), repr_layers=[-1, 2, 99])
    assert set(out["representations"]) == {2}
    assert "attentions" not in out and "contacts" not in out


@pytest.mark.parametrize(
    "tokens, message",
    [
        (torch.zeros(1, 1025, dtype=torch.int64), "above maximum  sequence length of 1024.*truncation_seq_length"),
        (torch.zeros(5, dtype=torch.int64), r"\(batch, length\) integers"),
        (torch.zeros(1, 5), r"\(batch, length\) integers"),
        (torch.tensor([[0, 33, 2]]), "0 to 32, got 0 to 33"),
        (torch.tensor([[0, -1, 2]]), "got -1 to 2"),
    ],
)
def test_bad_tokens_are_refused(fair_model, tmp_path, tokens, message):
    with pytest.raises(ValueError, match=message):
        load(fair_model, tmp_path)(tokens)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near(fair_model, tmp_path, dtype):
    """fair-esm's ESM-1b crashes in fp16; ours runs, with the residual stream in fp32."""
    exact, half = load(fair_model, tmp_path), load(fair_model, tmp_path, dtype=dtype)
    tokens = tokens_of(SEQUENCES)
    valid = tokens != 1
    with torch.no_grad():
        a, b = exact(tokens, repr_layers=[3])["representations"][3][valid], half(tokens, repr_layers=[3])
    assert b["logits"].dtype == dtype
    near = torch.nn.functional.cosine_similarity(a, b["representations"][3][valid].float(), dim=-1)
    assert near.min() > 0.995


def test_the_module_behaves_as_users_expect(fair_model, tmp_path):
    model, alphabet = esm_fast.load(save_fair_esm(fair_model, tmp_path / "tiny.pt"))
    assert (model.num_layers, model.args.attention_heads, len(alphabet)) == (3, 4, 33)
    assert set(model.state_dict()) == set(fair_model.state_dict())
    assert {n for n, _ in model.named_parameters()} == {n for n, _ in fair_model.named_parameters()}
    assert model.lm_head.weight is model.embed_tokens.weight
    for changed in (model.half(), model.bfloat16(), model.float(), model.to("cpu"), model.train(), model.eval()):
        assert changed is model
    fair_model_twin = copy.deepcopy(fair_model)
    fair_model_twin.load_state_dict(model.state_dict())  # and back again


def test_fair_esms_readme_example(fair_checkpoint):
    """The quick start of fair-esm, with the import and the model's name changed."""
    model, alphabet = esm_fast.pretrained.load_model_and_alphabet(str(fair_checkpoint))
    batch_converter = alphabet.get_batch_converter()
    model.eval()
    batch_labels, batch_strs, batch_tokens = batch_converter(SEQUENCES)
    batch_lens = (batch_tokens != alphabet.padding_idx).sum(1)
    with torch.no_grad():
        results = model(batch_tokens, repr_layers=[3], return_contacts=True)
    token_representations = results["representations"][3]
    means = [token_representations[i, 1 : n - 1].mean(0) for i, n in enumerate(batch_lens)]
    assert batch_labels == [label for label, _ in SEQUENCES] and len(means) == len(SEQUENCES)
    for (_, _), n, contacts in zip(SEQUENCES, batch_lens, results["contacts"], strict=True):
        assert contacts[:n, :n].shape[0] <= n
    with torch.no_grad():  # as above: a call that keeps gradients may run another kernel
        assert torch.equal(model.predict_contacts(batch_tokens), results["contacts"])


def test_contacts_without_a_regression_say_so(fair_model, tmp_path):
    with pytest.warns(UserWarning, match="no contact regression"):
        model, _ = esm_fast.load(save_fair_esm(fair_model, tmp_path / "bare.pt", regression=False))
    with pytest.raises(ValueError, match="no contact regression.*-contact-regression.pt"):
        model.predict_contacts(torch.tensor([[0, 5, 2]]))


def test_a_row_of_masks_alone_stays_finite():
    model = trained_like(esm_fast.ProteinBertModel(Config(2, 16, 32, 2)), 0)
    assert torch.isfinite(model(torch.tensor([[MASK, MASK]]))["logits"]).all()


def test_the_batched_dataset_equals_fair_esms(tmp_path):
    esm = pytest.importorskip("esm")
    file = tmp_path / "x.fasta"
    lengths = [5, 900, 3, 40, 41, 40, 1, 300, 299]
    file.write_text("".join(f">protein {i}\n{'ACDEF' * n}\n" for i, n in enumerate(lengths)))
    ours, theirs = (kind.from_file(file) for kind in (esm_fast.FastaBatchedDataset, esm.FastaBatchedDataset))
    assert len(ours) == len(theirs) and all(ours[i] == theirs[i] for i in range(len(ours)))
    for budget in (1, 250, 4096):
        assert ours.get_batch_indices(budget, 1) == theirs.get_batch_indices(budget, 1)
    with pytest.raises(ValueError, match="duplicate sequence labels: 'a'"):
        esm_fast.FastaBatchedDataset(["a", "b", "a"], ["A", "B", "C"])
