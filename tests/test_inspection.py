"""Looking inside: attention is shares of the right tokens, entropy is of the codes', the model stays as it was."""

import math

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from helpers import random_picture
from modeling_lumina_mgpt.decoding_lumina_mgpt import entropy
from modeling_lumina_mgpt.pipelines.cli import app
from modeling_lumina_mgpt.pipelines.inspection import (
    HEAT,
    SETTINGS,
    attention_over_sequence,
    describe_token,
    draw_attention,
    draw_entropy,
    draw_settings,
    find_sinks,
    watch,
)


@pytest.fixture
def watched(tiny_pipe):
    return watch(tiny_pipe, "a red sphere", height=32, width=48, generator=torch.Generator().manual_seed(0))


def test_a_watched_picture_is_the_one_drawn_unwatched(tiny_pipe, watched):
    options = {"height": 32, "width": 48, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    codes, uni_rep = tiny_pipe("a red sphere", **options).images[0], tiny_pipe.processor.uni_rep
    assert torch.equal(watched.ids[watched.codes_at], uni_rep.code_ids[codes])
    assert watched.codes_at[-1, -1] == len(watched.ids) - 1


def test_each_entropy_is_that_of_the_distribution_its_own_code_was_drawn_from(tiny_pipe):
    tiny_pipe.transformer.lm_head.weight.data *= 20  # untrained distributions are all but uniform
    drawn = watch(tiny_pipe, "a red sphere", height=32, width=48, guidance_scale=1.0)
    logits = tiny_pipe.transformer(drawn.ids[None]).logits[0, drawn.codes_at.flatten() - 1]
    nats = entropy(logits[:, tiny_pipe.processor.uni_rep.code_ids]).view(drawn.codes_at.shape)
    assert torch.allclose(drawn.entropy, nats, atol=1e-4) and nats.std() > 0.05


def test_pictures_of_every_task_are_watched_where_they_were_drawn(tiny_pipe):
    """What was given left no choice; of an edit the picture that was drawn counts, not the one it was made of."""
    picture = random_picture(64, 32)
    begun = watch(tiny_pipe, "a", image=picture, task="complete", height=64, width=64)
    assert (begun.entropy[:4] == 0).all() and (begun.entropy[4:] > 0).all()
    with pytest.raises(ValueError, match="this drew none, or panels"):
        watch(tiny_pipe, "a", task="pair", condition="depth", height=32, width=32)
    edited = watch(tiny_pipe, "a", image=picture)
    assert edited.codes_at.shape == (6, 10) and (edited.entropy > 0).all()
    uni_rep = tiny_pipe.processor.uni_rep
    codes = uni_rep.decode([*edited.ids[edited.codes_at[0, 0] - 3 :], uni_rep.end_of_line_id])
    assert edited.picture.tobytes() == tiny_pipe.processor.decode_image(codes).tobytes()


def test_settings_that_a_schedule_overrides_are_left_out(tiny_pipe):
    usual = tiny_pipe.transformer.generation_config
    heights = [draw_settings(tiny_pipe, "a", seed=0, height=16, width=16).height]
    usual.top_k_schedule = "entropy"
    heights.append(draw_settings(tiny_pipe, "a", seed=0, height=16, width=16).height)
    assert heights[0] > heights[1]


def test_attention_is_the_last_row_of_the_whole_matrix_and_the_implementation_stays(tiny_pipe, watched):
    model = tiny_pipe.transformer
    before = model.config._attn_implementation
    attention = attention_over_sequence(tiny_pipe, watched.ids)
    assert model.config._attn_implementation == before == "sdpa"
    assert attention.shape == (2, len(watched.ids))
    assert torch.allclose(attention.sum(1), torch.ones(2))
    model.set_attn_implementation("eager")
    whole = model(watched.ids[None], output_attentions=True).attentions
    assert torch.allclose(attention, torch.stack([layer[0, :, -1].mean(0) for layer in whole]), atol=1e-6)


def test_the_implementation_is_restored_after_an_error(tiny_pipe, watched, monkeypatch):
    layer = tiny_pipe.transformer.model.layers[0]
    usual = layer.forward

    def fail_when_eager(*args, **kwargs):
        if tiny_pipe.transformer.config._attn_implementation == "eager":
            raise RuntimeError("out of memory")
        return usual(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", fail_when_eager)
    with pytest.raises(RuntimeError, match="out of memory"):
        attention_over_sequence(tiny_pipe, watched.ids)
    assert tiny_pipe.transformer.config._attn_implementation == "sdpa"


def test_sinks_are_the_largest_shares_and_have_names(tiny_pipe, watched):
    attention = torch.full((100,), 0.5 / 96)
    attention[[3, 70, 20, 99]] = torch.tensor([0.2, 0.1, 0.15, 0.05])  # the last one is just at five times 1/100
    assert find_sinks(attention) == [3, 20, 70]
    assert find_sinks(torch.full((3,), 1 / 3)) == []
    start = int(watched.codes_at[0, 0]) - 3
    names = [describe_token(tiny_pipe, watched, i) for i in [start, start + 2, start + 3, start + 9, 0]]
    assert names[:4] == ["start of picture", "size, 48 px", "code in row 1, column 1", "end of line"]
    assert names[4].startswith("text")


def test_entropy_is_nothing_for_one_candidate_and_the_logarithm_of_equal_ones():
    certain = torch.full((1, 50), -torch.inf)
    certain[0, 7] = 3.0
    assert entropy(torch.cat([certain, torch.ones(1, 50)])).tolist() == pytest.approx([0, math.log(50)], abs=1e-6)


@pytest.mark.parametrize(("num_candidates", "nats"), [(64, math.log(64)), (1, 0.0)])
def test_the_entropy_map_is_of_the_guided_scores_of_codes_alone(tiny_pipe, monkeypatch, num_candidates, nats):
    """Whatever text would score, and whatever top-k and temperature leave."""
    uni_rep, head = tiny_pipe.processor.uni_rep, tiny_pipe.transformer.lm_head
    usual = head.forward

    def forward(hidden_states):
        logits = usual(hidden_states)
        logits[..., uni_rep.code_ids] = -1e9
        logits[..., uni_rep.code_ids[:num_candidates]] = 2.0
        return logits

    monkeypatch.setattr(head, "forward", forward)
    drawn = watch(tiny_pipe, "a", height=48, width=32, image_top_k=3, image_temperature=0.5)
    assert drawn.entropy.shape == uni_rep.grid(48, 32)
    assert torch.allclose(drawn.entropy, torch.full((6, 4), nats), atol=1e-4)
    assert draw_entropy(drawn).size[0] > 2 * drawn.picture.width  # a map without contrast is drawn, too


def test_the_map_of_attention_is_brightest_where_the_attention_is(tiny_pipe, watched, monkeypatch):
    peaked = torch.full((2, len(watched.ids)), 0.1 / len(watched.ids))
    peaked[:, watched.codes_at[1, 4]] = 0.9
    monkeypatch.setattr("modeling_lumina_mgpt.pipelines.inspection.attention_over_sequence", lambda *args: peaked)
    sheet, sinks = draw_attention(tiny_pipe, watched)
    assert len(sinks) == 1 and "row 2, column 5, 90.0%" in sinks[0]
    brightest = [
        xy
        for xy in ((x, y) for x in range(416, 800, 64) for y in range(80, 336, 64))
        if sheet.getpixel((xy[0] + 32, xy[1] + 32)) == tuple(HEAT[-1])
    ]
    assert brightest == [(416 + 4 * 64, 80 + 64)]


def test_settings_that_the_checkpoint_has_draw_the_same_picture_in_every_row(tiny_pipe, monkeypatch):
    drawn, usual = {}, type(tiny_pipe).__call__

    def see(self, prompt, generator, **settings):
        output = usual(self, prompt, generator=generator, **settings)
        ((name, values),) = settings.items()
        drawn[name] = dict(zip(values, output.images, strict=True))
        return output

    monkeypatch.setattr(type(tiny_pipe), "__call__", see)
    draw_settings(tiny_pipe, "a red sphere", seed=4)
    own = {"image_temperature": 1.0, "image_top_k": 2000, "guidance_scale": 4.0}
    assert drawn.keys() == SETTINGS.keys()
    assert len({drawn[name][value].tobytes() for name, value in own.items()}) == 1
    assert len({picture.tobytes() for row in drawn.values() for picture in row.values()}) > 5


def test_the_command_writes_three_pictures_and_says_what_they_show(tiny_folder, tmp_path):
    arguments = ["inspect", "a red sphere", "--size", "48x32", "--output-dir", str(tmp_path / "new")]
    result = CliRunner().invoke(app, [*arguments, "--model", str(tiny_folder)])
    assert result.exit_code == 0, result.stderr
    for name in ("attention", "entropy", "settings"):
        assert Image.open(tmp_path / "new" / f"{name}.png").width >= 640 and f"{name}.png" in result.stderr
    assert "sinks" in result.stdout and "nats" in result.stdout
