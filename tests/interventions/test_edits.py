"""Edits: neutral ones change nothing, each kind does what a plain loop does, the error term stays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmech as jm
from jaxmech.interventions.steering import feature_direction
from jaxmech.models.decoder import forward
from jaxmech.sae.module import SAE, SAEConfig

L = 4


def run(lm, tokens, edits=None):
    return forward(lm.config, lm.params, tokens, edits=edits, logits="all", taps=("resid_post",))


def single(saes, layer):
    return jax.tree.map(lambda a: a[saes.config.layers.index(layer)], saes)


@pytest.mark.slow
def test_neutral_edits_change_nothing(lm, tokens, saes):
    base = run(lm, tokens)
    resid = base.taps["resid_post"]
    spans = jm.edits.everywhere(L)
    neutral = {
        "add": jm.edits.add_vector(jnp.zeros((L, 32)), spans),
        "nowhere": jm.edits.add_vector(jnp.ones((L, 32)), jm.edits.everywhere(L, ())),
        "features": jm.edits.features(
            saes, jm.edits.select([(1, 2), (1, 5), (3, 0)], L), gain=1.0, shift=0.0, spans=spans
        ),
        "nothing selected": jm.edits.features(saes, jm.edits.select([], L), gain=0.0, shift=3.0, spans=spans),
        "self": jm.edits.Replace(donor=resid, spans=spans),
    }
    for name, edit in neutral.items():
        np.testing.assert_array_equal(run(lm, tokens, {"resid_post": (edit,)}).logits, base.logits, err_msg=name)


def test_feature_edits_keep_the_error_term(lm, tokens, saes):
    """Set, add and scale at layer 3, the last: compared with decoding the edited code and adding the error back."""
    x = run(lm, tokens).taps["resid_post"][3]
    sae, chosen = single(saes, 3), [4, 9]
    code = sae.encode(x)
    error = x - sae.decode(code)
    for gain, shift in [(0.0, 2.0), (1.0, 0.7), (3.0, 0.0)]:
        new = code.at[..., chosen].set(gain * code[..., chosen] + shift)
        edit = jm.edits.features(
            saes, jm.edits.select([(3, f) for f in chosen], L), gain=gain, shift=shift, spans=jm.edits.everywhere(L)
        )
        got = run(lm, tokens, {"resid_post": (edit,)}).taps["resid_post"][3]
        np.testing.assert_allclose(got, sae.decode(new) + error, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("activation", ["relu", "jumprelu"])
def test_gathered_features_are_the_full_code(saes, activation, subtract):
    params = {k: v for k, v in saes.params.items() if activation == "jumprelu" or k != "threshold"}
    stack = SAE(params, SAEConfig(d_in=32, d_sae=24, activation=activation, subtract_b_dec=subtract, layers=(1, 3)))
    encoder, W_dec = jm.edits.gather(stack, jm.edits.select([(1, 3), (1, 0), (3, 7)], L))
    x = jax.random.normal(jax.random.key(0), (L, 5, 9, 32))
    got = jax.vmap(lambda e, v: e.encode(v))(encoder, x)
    want = {layer: stack.at(layer).encode(x[layer]) for layer in (1, 3)}
    np.testing.assert_allclose(got[1], want[1][..., jnp.array([3, 0])], atol=1e-5)
    np.testing.assert_allclose(got[3, ..., 0], want[3][..., 7], atol=1e-5)
    assert not got[3, ..., 1].any() and not got[0].any() and not W_dec[3, 1].any()
    np.testing.assert_array_equal(W_dec[1, 0], stack.params["W_dec"][0, 3])


def test_topk_takes_the_exact_full_path(lm, tokens, saes):
    config = SAEConfig(d_in=32, d_sae=24, activation="topk", k=5, subtract_b_dec=True, layers=(1, 3))
    topk = SAE({k: v for k, v in saes.params.items() if k != "threshold"}, config)
    x = run(lm, tokens).taps["resid_post"][3]
    sae = single(topk, 3)
    code = sae.encode(x)
    new = code.at[..., 4].set(2.0)
    edit = jm.edits.features(topk, jm.edits.select([(3, 4)], L), gain=0.0, shift=2.0, spans=jm.edits.everywhere(L))
    assert isinstance(edit.encoder, jm.edits.Full)
    got = run(lm, tokens, {"resid_post": (edit,)}).taps["resid_post"][3]
    np.testing.assert_allclose(got, x + sae.decode(new) - sae.decode(code), rtol=1e-4, atol=1e-4)


def test_splice_and_parts_add_up(lm, tokens, saes):
    """The explained part and the rest together are the whole residual."""
    x = run(lm, tokens).taps["resid_post"]
    spans = jm.edits.everywhere(L, (3,))
    spliced = run(lm, tokens, {"resid_post": (jm.edits.splice(saes, L, spans=spans),)}).taps["resid_post"][3]
    np.testing.assert_allclose(spliced, single(saes, 3)(x[3]), rtol=1e-4, atol=1e-4)
    donor = jax.random.normal(jax.random.key(1), (L, 3, 32))
    last = jm.edits.at_last(L, 12, (3,))
    shares = [jnp.broadcast_to(jnp.array(p)[:, None], (2, L)) for p in ((0.0, 1.0), (1.0, -1.0))]
    parts = [
        jm.edits.patch_parts(saes, donor, whole=whole, explained=explained, spans=last) for whole, explained in shares
    ]
    got = run(lm, tokens, {"resid_post": tuple(parts)}).taps["resid_post"][3]
    np.testing.assert_allclose(got[:, -1], donor[3], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(got[:, :-1], x[3, :, :-1])


def test_projection_sets_one_direction(lm, tokens):
    u = jax.random.normal(jax.random.key(2), (L, 32))
    u /= jnp.linalg.norm(u, axis=-1, keepdims=True)
    edit = jm.edits.project(u, shift=jnp.full((L, 3), 1.5), spans=jm.edits.everywhere(L, (2,)))
    x, got = (run(lm, tokens, e).taps["resid_post"][2] for e in (None, {"resid_post": (edit,)}))
    np.testing.assert_allclose(got @ u[2], jnp.full((3, 12), 1.5), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got - (got @ u[2])[..., None] * u[2], x - (x @ u[2])[..., None] * u[2], atol=2e-4)


@pytest.mark.slow
def test_frozen_sublayers_let_only_the_residual_through(lm, tokens):
    sites = ("attn_out", "mlp_out")
    base = forward(lm.config, lm.params, tokens, taps=(*sites, "resid_post")).taps
    frozen = {s: (jm.edits.Replace(donor=base[s], spans=jm.edits.everywhere(L)),) for s in sites}
    push = {"resid_post": (jm.edits.add_vector(jnp.ones((L, 32)), jm.edits.everywhere(L, (1,))),)}
    got = run(lm, tokens, jm.edits.merge(push, frozen)).taps["resid_post"]
    np.testing.assert_allclose(got[3], base["resid_post"][3] + 1.0, rtol=1e-4, atol=1e-4)


def test_bad_selections_are_named(saes):
    with pytest.raises(ValueError, match=r"\(7, 1\)"):
        jm.edits.select([(7, 1)], L)
    with pytest.raises(ValueError, match="width"):
        jm.edits.select([(1, 1), (1, 2)], L, width=1)
    with pytest.raises(ValueError, match="layers"):
        jm.edits.everywhere(L, (9,))


def test_a_feature_acts_once(saes):
    """Listed twice it is refused, by whichever way it comes in."""
    for make in (
        lambda: jm.edits.select([(1, 5), (1, 2), (1, 5)], L),
        lambda: jm.edits.select_sets([[(1, 2)], [(1, 5), (np.int64(1), np.int64(5))]], L),
        lambda: jm.edits.features(saes, by_hand([5, 2, 5]), gain=0.0, shift=0.0, spans=jm.edits.everywhere(L)),
        lambda: feature_direction(saes, by_hand([5, 5, 2]), jnp.ones((L, 3))),
    ):
        with pytest.raises(ValueError, match=r"feature \(1, 5\) is listed twice"):
            make()
    jm.edits.gather(saes, by_hand([5, 2, 2], valid=[True, True, False]))  # what is not valid is padding


def by_hand(features, valid=(True, True, True)):
    index, chosen = np.zeros((L, 3), np.int32), np.zeros((L, 3), bool)
    index[1], chosen[1] = features, valid
    return jm.edits.Selection(jnp.asarray(index), jnp.asarray(chosen))


def test_bools_are_masks_and_integers_indices():
    want = np.array([False, True, False, True])
    for layers in (want, want.tolist(), jnp.asarray(want), [1, 3], (3, 1), np.array([1, 3]), jnp.array([1, 3]), {1, 3}):
        np.testing.assert_array_equal(jm.edits.everywhere(L, layers).prefix[:, 0], want)
    np.testing.assert_array_equal(jm.edits.everywhere(L, range(2)).prefix[:, 0], [True, True, False, False])
    assert not jm.edits.everywhere(L, ()).prefix.any() and not jm.edits.everywhere(L, np.zeros(0, int)).prefix.any()
    traced = jax.jit(lambda mask: jm.edits.everywhere(L, mask).prefix[:, 0])
    np.testing.assert_array_equal(traced(want), want)
    for layers in (
        np.ones(3, bool),
        [True],
        2,
        "12",
        np.array([1.0]),
        [[1, 3]],
        [0, 4],
        [-1],
        np.bool_(True),
        [True, 2],
    ):
        with pytest.raises(ValueError, match="^layers: expected"):
            jm.edits.everywhere(L, layers)
    with pytest.raises(ValueError, match="^layers: when traced, expected 4 bools"):
        jax.jit(lambda chosen: jm.edits.everywhere(L, chosen))(jnp.array([1, 3]))


def test_positions_are_masks():
    want = np.arange(6) >= 4
    for positions in (want, want.tolist(), jnp.asarray(want)):
        np.testing.assert_array_equal(jm.edits.at_positions(L, positions).prompt[0, 0], want)
    for positions in (jnp.array([5]), np.array([0, 0, 0, 0, 1, 1]), [5], 5, want.astype(float), np.True_):
        with pytest.raises(ValueError, match="^positions: expected bools .* for token 5 of T write np.arange"):
            jm.edits.at_positions(L, positions)


def test_what_does_not_fit_is_named(lm, tokens, saes):
    """Widths, numbers of prompts and tokens, and edits that do not know where they act."""
    spans, other = jm.edits.everywhere(L), SAEConfig(d_in=16, d_sae=24, layers=(1, 3))
    narrow = SAE({n: a[..., :16] if n in ("W_dec", "b_dec") else a for n, a in saes.params.items()}, other)
    narrow.params["W_enc"] = narrow.params["W_enc"][:, :16]
    here = r"^edits\['resid_post'\]: {} does not fit the activations here, \[B,T,D\] = \[3, 12, 32\]; its arrays"
    for name, edit in {
        "Add": jm.edits.add_vector(jnp.ones((L, 31)), spans),
        "Add ": jm.edits.add_vector(jnp.ones((L, 2, 32)), spans),
        "Add  ": jm.edits.add_vector(jnp.ones((L, 32)), jm.edits.at_last(L, 11)),
        "Replace": jm.edits.Replace(donor=jnp.ones((L, 3, 5, 32)), spans=spans),
        "Replace ": jm.edits.Replace(donor=jnp.ones((L, 1, 1, 8)), spans=spans),
        "Features": jm.edits.features(narrow, jm.edits.select([(1, 2)], L), gain=0.0, shift=0.0, spans=spans),
        "Features ": jm.edits.features(
            saes, jm.edits.select([(1, 2)], L), gain=jnp.ones((L, 5, 1)), shift=0.0, spans=spans
        ),
        "PatchParts": jm.edits.patch_parts(
            saes, jnp.ones((L, 2, 32)), whole=jnp.ones(L), explained=jnp.ones(L), spans=spans
        ),
    }.items():
        with pytest.raises(ValueError, match=here.format(name.strip())):
            run(lm, tokens, {"resid_post": (edit,)})
    for make in (
        lambda spans: jm.edits.add_vector(jnp.ones((L, 32)), spans),
        lambda spans: jm.edits.features(saes, jm.edits.select([(1, 2)], L), gain=0.0, shift=0.0, spans=spans),
        lambda spans: jm.edits.project(jnp.ones((L, 32)), shift=jnp.ones((L, 1)), spans=spans),
        lambda spans: jm.edits.splice(saes, L, spans=spans),
    ):
        with pytest.raises(ValueError, match=r"^spans: an edit has to know where it acts; .*, got NoneType"):
            make(None)
    chosen = jm.edits.select([(1, 2), (1, 4)], L)
    for wrong in (dict(gain=jnp.ones(3)), dict(shift=jnp.ones((3, 1, 2))), dict(gain=jnp.ones((1, L, 1, 2)))):
        with pytest.raises(
            ValueError, match=rf"^{next(iter(wrong))}: expected a number, or \[L,B,K\] with 4 layers and 2"
        ):
            jm.edits.features(saes, chosen, **(dict(gain=1.0, shift=0.0) | wrong), spans=spans)
    for make in (
        lambda: jm.edits.gather(saes, jm.edits.select([(1, 1)], 2)),
        lambda: jm.edits.splice(saes, 3, spans=jm.edits.everywhere(3)),
    ):
        with pytest.raises(ValueError, match="^saes: a dictionary of layer 3, yet there are layers 0"):
            make()
    with pytest.raises(ValueError, match=r"^direction: expected unit vectors \[L,D\]"):
        jm.edits.project(jnp.ones(32), shift=jnp.ones((L, 1)), spans=spans)
    with pytest.raises(ValueError, match=r"^vector: expected \[L,D\] or \[L,B,D\], got shape \(32,\)"):
        jm.edits.add_vector(np.ones(32), spans)


def test_a_traced_feature_that_does_not_exist_is_nan(saes):
    """Not the last feature's numbers, nor nothing."""

    def code(index, layer, activation="jumprelu"):
        config = SAEConfig(32, 24, activation=activation, k=3 if activation == "topk" else None, layers=(1, 3))
        stack = SAE({n: a for n, a in saes.params.items() if n != "threshold" or activation == "jumprelu"}, config)
        selection = jm.edits.Selection(
            jnp.zeros((L, 1), int).at[layer].set(index), jnp.zeros((L, 1), bool).at[layer].set(True)
        )
        edit = jm.edits.features(stack, selection, gain=0.0, shift=1.0, spans=jm.edits.everywhere(L))
        return jax.vmap(lambda e: e.delta(jnp.ones((1, 1, 32))))(edit)[:, 0, 0]

    for activation in ("jumprelu", "topk"):
        fine = jax.jit(code, static_argnums=2)(23, 1, activation)
        assert jnp.isfinite(fine).all() and fine[1].any()
        for index, layer in ((24, 1), (9999, 3), (-1, 1), (5, 2)):
            got = jax.jit(code, static_argnums=2)(index, layer, activation)
            assert jnp.isnan(got[layer]).all() and jnp.isfinite(jnp.delete(got, layer, 0)).all()


def test_a_traced_feature_that_stands_twice_is_nan(saes):
    def delta(selection):
        edit = jm.edits.features(saes, selection, gain=0.0, shift=1.0, spans=jm.edits.everywhere(L))
        return jax.vmap(lambda e: e.delta(jnp.ones((1, 1, 32))))(edit)

    once, twice = (jax.jit(delta)(by_hand(features)) for features in ([5, 2, 7], [5, 2, 5]))
    assert jnp.isfinite(once).all() and jnp.isnan(twice[1]).all() and jnp.isfinite(twice[2:]).all()
    padded = jax.jit(delta)(by_hand([5, 2, 2], valid=[True, True, False]))
    assert jnp.isfinite(padded).all()


def test_nan_activations_stay_nan(saes):
    encoder, _ = jm.edits.gather(saes, jm.edits.select([(1, 3)], L))
    x = jnp.ones((L, 1, 2, 32)).at[:, 0, 1, 5].set(jnp.nan)
    got = jax.vmap(lambda e, v: e.encode(v))(encoder, x)[1, 0, :, 0]
    assert jnp.isfinite(got[0]) and jnp.isnan(got[1])


def test_features_that_do_not_exist_are_refused(saes):
    for pair, message in (((2, 0), "dictionaries at layers 1, 3"), ((1, 24), "with features 0..23")):
        with pytest.raises(ValueError, match=rf"feature \({pair[0]}, {pair[1]}\) does not exist.*{message}"):
            jm.edits.features(saes, jm.edits.select([pair], 4), gain=1.0, shift=1.0, spans=jm.edits.everywhere(4))
    with pytest.raises(ValueError, match="an index from 0 on"):
        jm.edits.select([(1, -1)], 4)


def test_transcoder_features_are_read_at_one_site_and_written_at_another(lm, tokens, saes):
    """Layers 1 and 3 at once: what layer 3 reads is what layer 1's change made of it."""
    W_skip = jax.random.normal(jax.random.key(5), (2, 32, 32)) / 6
    config = SAEConfig(32, 24, subtract_b_dec=False, skip=True, site="mlp_in", site_out="mlp_out", layers=(1, 3))
    coder = SAE({**saes.params, "W_skip": W_skip}, config)
    edit = jm.edits.features(
        coder, jm.edits.select([(1, 4), (3, 9)], L), gain=2.0, shift=0.5, spans=jm.edits.everywhere(L)
    )
    taps = ("mlp_in", "mlp_out")
    got = forward(lm.config, lm.params, tokens, taps=taps, edits={"mlp_out": (edit,)}).taps
    for layer, feature in ((1, 4), (3, 9)):
        # Without the edit at this layer, the layers below edited alike: what the sublayer itself gives out.
        below = jm.edits.features(
            coder, jm.edits.select([(1, 4)] * (layer == 3), L), gain=2.0, shift=0.5, spans=jm.edits.everywhere(L)
        )
        out = forward(lm.config, lm.params, tokens, taps=taps, edits={"mlp_out": (below,)}).taps
        sae, read = coder.at(layer), out["mlp_in"][layer]
        np.testing.assert_allclose(got["mlp_in"][layer], read, rtol=1e-5, atol=1e-5)
        code = sae.encode(read)
        new = code.at[..., feature].set(2 * code[..., feature] + 0.5)
        change = sae.decode(new, read) - sae.decode(code, read)
        np.testing.assert_allclose(got["mlp_out"][layer], out["mlp_out"][layer] + change, rtol=1e-4, atol=1e-4)
    one = jnp.ones(L)
    for make in (
        lambda spans: jm.edits.splice(coder, L, spans=spans),
        lambda spans: jm.edits.patch_parts(coder, jnp.zeros((L, 3, 32)), whole=one, explained=one, spans=spans),
    ):
        with pytest.raises(ValueError, match="reads mlp_in and writes mlp_out"):
            make(jm.edits.everywhere(L))


@pytest.mark.parametrize("normalize", ["norm", "layer_norm"])
def test_features_of_normalised_tokens_keep_the_error_term(lm, tokens, saes, normalize):
    x = run(lm, tokens).taps["resid_post"][3]
    stack = saes.replace(config=SAEConfig(32, 24, normalize=normalize, layers=(1, 3)))
    sae, chosen = stack.at(3), [4, 9]
    code = sae.encode(x)
    assert (np.asarray(code[..., chosen]) > 0).any()
    new = code.at[..., chosen].set(0.7 + code[..., chosen])
    edit = jm.edits.features(
        stack, jm.edits.select([(3, f) for f in chosen], L), gain=1.0, shift=0.7, spans=jm.edits.everywhere(L)
    )
    got = run(lm, tokens, {"resid_post": (edit,)}).taps["resid_post"][3]
    np.testing.assert_allclose(got, x + sae.decode(new, x) - sae.decode(code, x), rtol=1e-4, atol=1e-4)
    gathered = edit.encoder.replace(**{n: getattr(edit.encoder, n)[3] for n in ("W_enc", "b_enc", "threshold")})
    np.testing.assert_allclose(gathered.encode(x), code[..., jnp.array(chosen)], rtol=1e-4, atol=1e-4)


def test_one_dictionary_serves_as_a_stack_of_one(lm, tokens, saes):
    chosen, spans = jm.edits.select([(3, 4)], L), jm.edits.everywhere(L)
    for make in (
        lambda s: jm.edits.features(s, chosen, gain=0.0, shift=1.0, spans=spans),
        lambda s: jm.edits.splice(s, L, spans=spans),
    ):
        one, stack = (make(s) for s in (saes.at(3), saes.at(3).as_stack()))
        got, want = (run(lm, tokens, {"resid_post": (edit,)}).logits for edit in (one, stack))
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("activation", ["topk", "abstopk", "batchtopk"])
def test_features_of_topk_kinds_are_not_gathered(saes, activation):
    stack = SAE(saes.params, SAEConfig(32, 24, activation=activation, k=3, layers=(1, 3)))
    with pytest.raises(ValueError, match=f"a {activation} code depends on all features.*sae.encode"):
        jm.edits.gather_features(stack, jm.edits.select([(1, 2)], L))
    if activation == "batchtopk":
        for edit in (jm.edits.gather, lambda s, _: jm.edits.splice(s, L, spans=jm.edits.everywhere(L))):
            with pytest.raises(ValueError, match="ranks all tokens of a call, padding.*batch_topk=False"):
                edit(stack, jm.edits.select([(1, 2)], L))


def test_edits_of_a_dictionary_belong_to_its_site(lm, tokens, saes):
    edit = jm.edits.features(saes, jm.edits.select([(1, 2)], L), gain=0.0, shift=1.0, spans=jm.edits.everywhere(L))
    with pytest.raises(ValueError, match=r"edits\['resid_pre'\]: this edit is made of dictionaries of resid_post"):
        run(lm, tokens, {"resid_pre": (edit,)})
    with pytest.raises(ValueError, match="reads 'mlp_out', which a layer does not compute before resid_mid"):
        run(lm, tokens, {"resid_mid": (edit.replace(site=None, reads="mlp_out"),)})
