"""vit.py against its formulas, and what follows: the ViT, then CLIP, published weights."""
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from test_unet import linear, without_gradient
from torch import nn
from torch.testing import assert_close

import vit
from vit import CLIP, Attention, Convolutions, Patches, Published, TextEncoder, ViT

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)                            # of published weights
IDS = torch.tensor([[17, 3, 4, 19, 0, 0, 0], [17, 5, 6, 7, 8, 9, 19], [17, 19, 0, 0, 0, 0, 0]])


def awake(module, scale=0.3):
    """The module in float64, with all its weights moved, also those that start at 0 or 1."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(scale * torch.randn_like(p))
    return module.double()


def small(**kw):
    return awake(ViT(**dict(classes=5, size=16, patch=4, dim=16, depth=2, heads=4) | kw))


def small_clip():
    return awake(CLIP(ViT(6, 8, 4, 16, 1, 2), TextEncoder(20, 7, 16, 2, 2)))


def rand64(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# ---- the formulas

def layer_norm(layer, x):
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return normed * layer.weight + layer.bias


def attention_by_hand(layer, x, context=None, mask=None):
    """Vaswani et al. 2017, Eq. 1, head by head; keys that are masked get a score of -inf."""
    heads, d, L = [], x.shape[-1] // layer.heads, x.shape[1]
    x = x if context is None else torch.cat([x, context], 1)
    for h in range(layer.heads):
        q, k, v = (z[..., h * d:(h + 1) * d] for z in linear(layer.qkv, x).chunk(3, -1))
        scores = q[:, :L] @ k.transpose(1, 2) / math.sqrt(d)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], -math.inf)
        if layer.causal:
            scores = scores.masked_fill(torch.ones(L, L).triu(1).bool(), -math.inf)
        heads.append(scores.softmax(-1) @ v)
    return linear(layer.out, torch.cat(heads, -1))


def block_by_hand(block, x):
    """Dosovitskiy et al. 2021, Eqs. 2 and 3."""
    x = x + attention_by_hand(block.attention, layer_norm(block.norm1, x))
    up, _, down = block.mlp
    return x + linear(down, F.gelu(linear(up, layer_norm(block.norm2, x))))


def patches_by_hand(stem, x):
    """A linear map of the patches is a convolution whose stride is its size."""
    p, D = stem.patch, stem.embed.out_features
    kernel = stem.embed.weight.view(D, p, p, -1).permute(0, 3, 1, 2)     # pixels, then channels
    return F.conv2d(x, kernel, stem.embed.bias, stride=p).flatten(2).transpose(1, 2)


def convolutions_by_hand(stem, x):
    """Xiao et al. 2021: strides 2, 1, 2, 2 ..., after each convolution GroupNorm and GELU."""
    *layers, last = stem.layers
    for k in range(0, len(layers), 3):
        x = F.conv2d(x, layers[k].weight, stride=1 if k == 3 else 2, padding=1)
        x = F.gelu(F.group_norm(x, 8, layers[k + 1].weight, layers[k + 1].bias))
    return F.conv2d(x, last.weight, last.bias).flatten(2).transpose(1, 2)


def positions_by_hand(rows, cols, dim):
    """Of every token, row by row: sines, then cosines, first of its column, then of its row."""
    lengths = [10_000 ** (k / (dim // 4 - 1)) for k in range(dim // 4)]
    return torch.tensor([[f(place / length) for place in (col, row) for f in (math.sin, math.cos)
                          for length in lengths] for row in range(rows) for col in range(cols)])


def test_attention_is_vaswani_eq_1_head_by_head():
    x, context = rand64(2, 3, 12), rand64(2, 4, 12) + 1
    mask = torch.tensor([[1, 0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 0, 1, 1]]).bool()
    attention, causal = awake(Attention(12, 3)), awake(Attention(12, 3, causal=True))
    for layer, *more in ((attention,), (causal,), (attention, context), (attention, context, mask)):
        assert_close(layer(x, *more), attention_by_hand(layer, x, *more))


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_the_stem_is_convolutions_with_norms_and_gelus_between(patch):
    stem, x = awake(Convolutions(3, patch, 16)), rand64(2, 3, 16, 24)
    assert_close(stem(x), convolutions_by_hand(stem, x))


@pytest.mark.parametrize("stem, by_hand, size, patch", [
    (Convolutions, convolutions_by_hand, 16, 4), (Patches, patches_by_hand, 18, 6)])
def test_the_vit_is_stem_plus_positions_then_blocks_norm_mean_and_head(stem, by_hand, size, patch):
    side, x = size // patch, rand64(2, 3, size, size)
    model = small(stem=stem, size=size, patch=patch)
    tokens = by_hand(model.stem, x) + 0.1 * positions_by_hand(side, side, 16)
    for block in model.blocks:
        tokens = block_by_hand(block, tokens)
    features = layer_norm(model.norm, tokens).sum(1) / side**2
    assert_close(model.features(x), features)
    assert_close(model(x), linear(model.head, features))


def test_scores_are_cosines_of_image_and_text_which_is_read_at_its_end():
    clip, x = small_clip(), rand64(3, 3, 8, 8)
    tokens = clip.text.embed(IDS) + clip.text.positions
    for block in clip.text.blocks:
        tokens = block_by_hand(block, tokens)
    tokens = layer_norm(clip.text.norm, tokens)
    texts = torch.stack([tokens[b, end] for b, end in enumerate((3, 6, 1))]) @ clip.project.weight.T
    cosines = F.cosine_similarity(clip.image(x)[:, None], texts[None], dim=-1)
    assert_close(clip(x, IDS), cosines * clip.log_scale.exp())


# ---- what follows for the ViT

def test_before_training_blocks_are_the_identity_and_a_vit_sees_what_its_stem_sees():
    model, x = ViT(5, size=16, patch=4, dim=16, depth=3, heads=2), torch.randn(2, 3, 16, 16)
    tokens = model.stem(x) + model.positions
    assert torch.equal(model.blocks(tokens), tokens)
    assert_close(model.features(x), model.norm(tokens).mean(1))


def test_the_first_loss_is_ln_K_but_for_a_percent_and_its_gradient_reaches_the_stem():
    torch.manual_seed(0)
    model, y = ViT(5, size=16, patch=4, dim=32, depth=1, heads=2), torch.arange(60) % 5
    loss = F.cross_entropy(model(torch.randn(60, 3, 16, 16)), y)
    assert loss.item() == pytest.approx(math.log(5), rel=0.01)
    loss.backward()
    assert model.stem.layers[0].weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("channels", [4, 7])
def test_with_a_mask_tokens_count_by_how_much_of_the_building_they_show(channels):
    tokens, x = rand64(3, 4, 16), torch.full((3, channels, 8, 8), -1.0, dtype=torch.float64)
    x[0, -1, :4, :4] = 1                                # all of the first patch
    x[1, -1, :4, 2:8] = 1                               # half of it, and all of the second
    mean = vit.mean_token(tokens, x)                    # in the third image there is no building
    assert_close(mean[0], tokens[0, 0], rtol=0, atol=0.01)
    assert_close(mean[1], (tokens[1, 0] + 2 * tokens[1, 1]) / 3, rtol=0, atol=0.01)
    assert_close(mean[2], tokens[2].mean(0))
    for channels in (3, 6):                             # no mask: one image, or two of a place
        assert_close(vit.mean_token(tokens, rand64(3, channels, 8, 8)), tokens.mean(1))


def test_a_model_of_masked_images_reads_its_features_by_the_mask():
    model, x = small(channels=4), rand64(2, 4, 16, 16)
    x[:, -1] = x[:, -1].sign()
    seen = []
    model.norm.register_forward_hook(lambda _, args, out: seen.append(out))
    assert_close(model.features(x), vit.mean_token(seen[0], x))
    assert (model.features(x) - seen[0].mean(1)).abs().max() > 0.01


@pytest.mark.parametrize("kw, message", [
    (dict(patch=5), "patches of 5"), (dict(heads=5), "5 attention heads"),
    (dict(size=18, patch=6), "2, 4, 8 ... pixels .* not 6 and 16"), (dict(patch=1), "not 1 and 16"),
    (dict(dim=24), "divisible by 16, not 4 and 24"),
    (dict(dim=30, heads=2, stem=Patches), "divisible by 4")])
def test_sizes_that_do_not_fit_are_refused(kw, message):
    with pytest.raises(ValueError, match=message):
        small(**kw)


def test_the_demo_prints_the_shapes_on_the_way_through(capsys):
    vit.main()
    out = capsys.readouterr().out
    assert "stem                       (2, 3, 64, 64) -> (2, 64, 192)" in out
    assert out.endswith("ViT                        (2, 3, 64, 64) -> (2, 45)\n")


# ---- and for CLIP

def test_words_are_their_places_in_the_vocabulary_and_unknown_ones_are_left_out():
    words = vit.vocabulary(["River, boats", "2 boats; sea_ice"])
    assert words == ["2", "boats", "ice", "river", "sea"]
    ids = vit.word_tokens(["River, 2 (boats)!", "a boat", "", "river " * 100], words)
    assert ids.shape == (4, vit.LENGTH) and ids[3].tolist() == [6, *[4] * (vit.LENGTH - 2), 7]
    assert ids[:3, :5].tolist() == [[6, 4, 1, 2, 7], [6, 7, 0, 0, 0], [6, 7, 0, 0, 0]]
    assert not ids[:3, 5:].any()
    assert vit.word_tokens(["ice", ""], words).tolist() == [[6, 3, 7], [6, 7, 0]]


def test_no_token_of_a_text_sees_a_later_one():
    text, changed = awake(TextEncoder(20, 7, 16, 2, 2)), IDS.clone()
    changed[:, 4] = 11
    before, after = text(IDS), text(changed)
    assert torch.equal(before[:, :4], after[:, :4])
    assert ((before - after)[:, 4:].abs().amax(2) > 1e-6).all()


def test_training_starts_from_chance_and_reaches_every_parameter():
    torch.manual_seed(0)
    clip = CLIP(ViT(6, 8, 4, 16, 1, 2), TextEncoder(20, 7, 16, 2, 2))
    assert clip.log_scale.exp().item() == pytest.approx(1 / 0.07)        # Radford et al. 2.5
    loss = vit.contrastive(clip(torch.randn(3, 3, 8, 8), IDS))
    assert loss.item() == pytest.approx(math.log(3), rel=0.5)
    clip = small_clip()
    vit.contrastive(clip(rand64(3, 3, 8, 8), IDS)).backward()
    assert not without_gradient(clip)


# ---- published weights, by fakes of the two libraries

class FakeModel(nn.Module):
    """Features of an image: its mean colours; of a text: its first three ids."""
    def __init__(self, wrapped=False):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.config = SimpleNamespace(vision_config=SimpleNamespace(image_size=12),
                                      text_config=SimpleNamespace(max_position_embeddings=5))
        self.wrap = (lambda z: SimpleNamespace(pooler_output=z)) if wrapped else (lambda z: z)
    def encode_image(self, x):
        return self.wrap(x.mean((2, 3)))
    def encode_text(self, ids):
        return self.wrap(ids[:, :3].float())
    get_image_features, get_text_features = encode_image, encode_text


def fake_open_clip(size):
    config = dict(size=size, mean=MEAN, std=STD)
    models = {("ViT-B-32", "weights.pt"): FakeModel()}
    return SimpleNamespace(
        create_model=lambda *name: models[name], get_tokenizer=lambda name: f"tokens of {name}",
        get_model_preprocess_cfg=lambda model: config)


def fake_transformers(wrapped):
    def tokenizer(texts, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        return SimpleNamespace(input_ids=torch.full((len(texts), max_length), len(texts[0])))
    def auto(thing):
        return SimpleNamespace(from_pretrained={"owner/name": thing}.__getitem__)
    processor = SimpleNamespace(image_mean=list(MEAN), image_std=list(STD))
    return SimpleNamespace(AutoModel=auto(FakeModel(wrapped)), AutoTokenizer=auto(tokenizer),
                           AutoImageProcessor=auto(processor))


def check_encoders(published):
    x = torch.rand(2, 3, 12, 12)
    colours = (x.mean((2, 3)) - torch.tensor(MEAN)) / torch.tensor(STD)
    assert_close(published.encode_image(2 * x - 1), F.normalize(colours, dim=1))
    assert_close(published.encode_text(torch.tensor([[3, 0, 4, 9]])), torch.tensor([[0.6, 0, 0.8]]))
    assert published.size == 12 and published.log_scale.item() == 2


@pytest.mark.parametrize("size", [12, (12, 12), [12, 10]])
def test_weights_of_open_clip_are_a_clip(monkeypatch, size):
    monkeypatch.setitem(sys.modules, "open_clip", fake_open_clip(size))
    published = Published("ViT-B-32:weights.pt")
    check_encoders(published)
    assert published.tokens == "tokens of ViT-B-32"


@pytest.mark.parametrize("wrapped", [False, True])                       # transformers 4, 5
def test_weights_of_transformers_are_a_clip(monkeypatch, wrapped):
    monkeypatch.setitem(sys.modules, "transformers", fake_transformers(wrapped))
    published = Published("owner/name")
    check_encoders(published)
    assert published.tokens(["abc", "d"]).tolist() == [[3] * 5] * 2
    assert vit.zero_shot(published, published.tokens, ["river", "sea"]).shape == (2, 3)


@pytest.mark.parametrize("name, library, package", [
    ("ViT-B-32:openai", "open_clip", "open_clip_torch"), ("owner/name", *["transformers"] * 2)])
def test_without_the_library_it_is_said_what_to_install(monkeypatch, name, library, package):
    monkeypatch.setitem(sys.modules, library, None)                  # its import is an ImportError
    with pytest.raises(ValueError, match=f"pip install {package}"):
        Published(name)


def test_the_real_open_clip_gives_the_same(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    image = dict(image_size=32, layers=1, width=64, head_width=32, patch_size=16)
    text = dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=1)
    config = json.dumps(dict(embed_dim=24, vision_cfg=image, text_cfg=text))
    (tmp_path / "tiny.json").write_text(config)
    open_clip.add_model_config(tmp_path)
    model = open_clip.create_model("tiny").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    published = Published(f"tiny:{tmp_path / 'weights.pt'}").eval()
    x, ids = torch.rand(2, 3, 32, 32), open_clip.get_tokenizer("tiny")(["a river", "trees"])
    normalised = open_clip.image_transform(32, is_train=False).transforms[-1](x)
    assert_close(published.encode_image(2 * x - 1), model.encode_image(normalised, normalize=True))
    vectors = published.encode_text(published.tokens(["a river", "trees"]))
    assert_close(vectors, model.encode_text(ids, normalize=True))


@pytest.mark.parametrize("kind", ["CLIP", "Siglip"])
def test_the_real_transformers_give_the_same(tmp_path, kind):
    transformers, tokenizers = map(pytest.importorskip, ("transformers", "tokenizers"))
    Config, Model, Processor = (getattr(transformers, kind + name)
                                for name in ("Config", "Model", "ImageProcessor"))
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    text = dict(vocab_size=6, max_position_embeddings=7, bos_token_id=1, eos_token_id=5)
    vision = dict(image_size=32, patch_size=16)
    model = Model(Config(text_config=sizes | text, vision_config=sizes | vision)).eval()
    model.save_pretrained(tmp_path)
    Processor(image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    vocabulary = {"<unk>": 0, "a": 2, "river": 3, "trees": 4, "<end>": 5}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<end>")
    tokenizer.save_pretrained(tmp_path)
    published = Published(str(tmp_path)).eval()
    x, ids = torch.rand(2, 3, 32, 32), torch.tensor([[2, 3, *[5] * 5], [4, *[5] * 6]])
    mean, std = torch.tensor([MEAN, STD]).view(2, 3, 1, 1)
    expected = model(input_ids=ids, pixel_values=(x - mean) / std)
    assert_close(published.encode_image(2 * x - 1), expected.image_embeds)
    vectors = published.encode_text(published.tokens(["a river", "trees"]))
    assert_close(vectors, expected.text_embeds)
