"""The section sweep: what a space and a goal may say, what is tried, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from raydiv.config import Recipe, load_recipe, save_recipe, with_changes
from raydiv.config.sweep import Interval, SearchParameter, SweepConstraint, SweepObjective
from raydiv.experiments.sweep.goal import whole_names
from raydiv.experiments.sweep.space import MOST_CHECKED, draw, encoded, grid, recipes_of, representatives
from raydiv.utils.errors import UserError

SPACE = {
    "loss.divergence": ["kl", "alpha"],
    "loss.alpha": {"in": "uniform(0.2, 0.8)", "when": {"loss.divergence": "alpha"}},
    "optim.lr": "loguniform(1e-5, 1e-3)",
}


def recipe_with(sweep: dict[str, Any] | None = None, **sections: Any) -> Recipe:
    default = {"space": SPACE, "goal": "maximize reward/margin", "search": "tpe", "trials": 5}
    tree: dict[str, Any] = {
        "model": {"id": "nowhere"},
        "loss": {"type": "fdo"},
        "optim": {"steps": 10},
        "sweep": default | (sweep or {}),
    }
    return load_recipe(tree | sections)


def test_a_space_is_read_and_written_as_it_was(tmp_path: Path) -> None:
    recipe = recipe_with()
    assert recipe.sweep is not None
    assert recipe.sweep.parameters == [
        SearchParameter("loss.divergence", ("kl", "alpha"), {}),
        SearchParameter("loss.alpha", Interval("uniform", 0.2, 0.8), {"loss.divergence": ("alpha",)}),
        SearchParameter("optim.lr", Interval("loguniform", 1e-5, 1e-3), {}),
    ]
    save_recipe(recipe, tmp_path / "recipe.yaml")
    again = load_recipe(tmp_path / "recipe.yaml")
    assert again.sweep is not None
    assert again.sweep.parameters == recipe.sweep.parameters


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ("uniform(0, 1)", (0, 1)),
        ("quniform(0, 1, 0.25)", (0, 1)),
        ("randint(1, 5)", (1, 4)),
        ("lograndint(1, 100)", (1, 99)),
        (" loguniform( 1e-5 , 1E-3 ) ", (1e-5, 1e-3)),
    ],
)
def test_intervals_have_the_names_and_ends_of_ray_tune(said: str, ends: tuple[float, float]) -> None:
    recipe = recipe_with({"space": {"optim.lr": said}})
    assert recipe.sweep is not None
    (parameter,) = recipe.sweep.parameters
    assert isinstance(parameter.values, Interval)
    assert parameter.values.ends == ends


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"space": {}}, "sweep.space: dictionary should have at least 1 item"),
        ({"space": {"loss.beta": []}}, "loss.beta: an empty list"),
        ({"space": {"loss.beta": [0.1, 0.1]}}, "loss.beta: a choice is there twice"),
        ({"space": {"loss.beta": 0.1}}, "loss.beta: must be a list of choices or one of uniform"),
        ({"space": {"loss.beta": "normal(0, 1)"}}, "loss.beta: must be a list of choices or one of uniform"),
        ({"space": {"loss.beta": "uniform(0.1)"}}, "uniform takes 2 numbers, found (0.1)"),
        ({"space": {"loss.beta": "uniform(a, b)"}}, "uniform takes 2 numbers, found (a, b)"),
        ({"space": {"loss.beta": "uniform(0.1, inf)"}}, "uniform takes 2 numbers"),
        ({"space": {"loss.beta": "uniform(1, 0.1)"}}, "has nothing between its ends"),
        ({"space": {"optim.warmup": "randint(3, 4)"}}, "has nothing between its ends"),
        ({"space": {"optim.warmup": "randint(0, 2.5)"}}, "takes whole numbers"),
        ({"space": {"loss.beta": "loguniform(0, 1)"}}, "needs ends above 0"),
        ({"space": {"loss.beta": "quniform(0, 1, 2)"}}, "takes a step between 0 and 1"),
        ({"space": {"name": ["a", "b"]}}, "name: is the same for all trials"),
        ({"space": {"cluster.num_workers": [1, 2]}}, "cluster.num_workers: is the same for all trials"),
        ({"space": {"loss.alpha": {"in": [0.5], "when": {"loss.divergence": "alpha"}}}}, "must stand in the space too"),
        (
            {"space": {"loss.type": ["dpo", "kto"], "loss.beta": {"in": [0.5], "when": {"loss.type": "dpoo"}}}},
            "loss.beta: when: loss.type is never 'dpoo': the space has 'dpo', 'kto'",
        ),
        (
            {"space": {"loss.beta": "uniform(0, 1)", "optim.lr": {"in": [1], "when": {"loss.beta": 0.5}}}},
            "optim.lr: when: loss.beta must be a list of choices in the space, and is uniform(0, 1)",
        ),
        ({"space": {"loss.alpha": {"in": [0.5]}}}, "is {in: VALUES, when: {KEY: CHOICES}}"),
        ({"search": "grid", "trials": None}, "grid needs lists; loss.alpha is uniform(0.2, 0.8)"),
        ({"search": "grid", "space": {"loss.beta": [1, 2]}}, "trials means nothing with search: grid"),
        ({"trials": None}, "search: tpe needs trials"),
        ({"scheduler": "pbt"}, "population-based training is not offered"),
        ({"grace": 3}, "grace means nothing without scheduler: asha"),
        ({"scheduler": "asha", "goal": "maximize a, minimize b"}, "say which, as stop_on"),
        ({"scheduler": "asha", "stop_on": "loss"}, "neither maximize METRIC nor minimize METRIC"),
        ({"scheduler": "asha", "reduction": 1}, "sweep.reduction"),
        ({"goal": "separation/d_b"}, "neither maximize METRIC nor minimize METRIC"),
        ({"goal": "maximize a, maximize a"}, "an objective is there twice"),
        ({"goal": "maximize a subject to b < 0.1"}, "is no bound such as METRIC <= 0.1"),
        ({"goal": "maximize a subject to b <= 1.2.3"}, "is no bound such as METRIC <= 0.1"),
        ({"seach": "tpe"}, "sweep.seach: unknown key (did you mean search?)"),
    ],
)
def test_bad_sweeps_are_refused(sweep: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        recipe_with(sweep)
    assert said in str(error.value)


def test_a_goal_has_objectives_and_constraints() -> None:
    words = (
        "maximize separation/d_b, minimise evaluate/asr subject to over_refusal <= 0.1 and capability/mmlu/acc >= -2e-1"
    )
    sweep = recipe_with({"goal": words}).sweep
    assert sweep is not None
    assert sweep.objectives == [
        SweepObjective("separation/d_b", "maximize"),
        SweepObjective("evaluate/asr", "minimize"),
    ]
    assert sweep.constraints == [
        SweepConstraint("over_refusal", "<=", 0.1),
        SweepConstraint("capability/mmlu/acc", ">=", -0.2),
    ]
    assert sweep.constraints[0].violation(0.25) == pytest.approx(0.15)
    assert sweep.constraints[1].violation(-0.1) == pytest.approx(-0.1)


LISTS = {
    "loss.divergence": ["kl", "alpha"],
    "loss.alpha": {"in": [0.3, 0.6], "when": {"loss.divergence": ["alpha"]}},
    "loss.beta": [0.1, 0.2],
}


def test_a_grid_gives_a_parameter_only_where_it_applies() -> None:
    sweep = recipe_with({"space": LISTS, "search": "grid", "trials": None}).sweep
    assert sweep is not None
    assert grid(sweep.parameters) == [
        {"loss.divergence": "kl", "loss.beta": 0.1},
        {"loss.divergence": "kl", "loss.beta": 0.2},
        {"loss.divergence": "alpha", "loss.alpha": 0.3, "loss.beta": 0.1},
        {"loss.divergence": "alpha", "loss.alpha": 0.3, "loss.beta": 0.2},
        {"loss.divergence": "alpha", "loss.alpha": 0.6, "loss.beta": 0.1},
        {"loss.divergence": "alpha", "loss.alpha": 0.6, "loss.beta": 0.2},
    ]


def test_corners_stand_for_what_is_not_known_beforehand() -> None:
    assert representatives(recipe_with()) == [
        {"loss.divergence": "kl", "optim.lr": 1e-5},
        {"loss.divergence": "kl", "optim.lr": 1e-3},
        {"loss.divergence": "alpha", "loss.alpha": 0.2, "optim.lr": 1e-5},
        {"loss.divergence": "alpha", "loss.alpha": 0.2, "optim.lr": 1e-3},
        {"loss.divergence": "alpha", "loss.alpha": 0.8, "optim.lr": 1e-5},
        {"loss.divergence": "alpha", "loss.alpha": 0.8, "optim.lr": 1e-3},
    ]


def test_draws_are_different_within_their_ends_and_a_beginning_of_more() -> None:
    sweep = recipe_with().sweep
    assert sweep is not None
    few, many = draw(sweep.parameters, 10, seed=3), draw(sweep.parameters, 30, seed=3)
    assert many[:10] == few
    assert draw(sweep.parameters, 10, seed=4) != few
    assert len({json.dumps(one) for one in many}) == 30
    for one in many:
        assert ("loss.alpha" in one) == (one["loss.divergence"] == "alpha")
        assert 1e-5 <= one["optim.lr"] <= 1e-3
        assert 0.2 <= one.get("loss.alpha", 0.5) <= 0.8
        assert len(f"{one['optim.lr']:e}".partition("e")[0].rstrip("0")) <= 5
    assert encoded(sweep.parameters, {"loss.divergence": "alpha", "optim.lr": 1e-4}) == {
        "loss.divergence": 1,
        "optim.lr": 1e-4,
    }


def test_a_small_space_is_drawn_whole_and_no_more() -> None:
    sweep = recipe_with({"space": {"loss.beta": [0.1, 0.2, 0.3]}}).sweep
    assert sweep is not None
    assert sorted(one["loss.beta"] for one in draw(sweep.parameters, 9, seed=0)) == [0.1, 0.2, 0.3]


def test_every_trial_is_a_recipe_of_its_own() -> None:
    recipe = recipe_with({"space": LISTS, "search": "grid", "trials": None})
    recipes = recipes_of(recipe, representatives(recipe))
    assert [one.loss.options for one in recipes[1:4:2]] == [
        {"beta": 0.2, "divergence": "kl", "alpha": 0.5},
        {"beta": 0.2, "divergence": "alpha", "alpha": 0.3},
    ]
    assert all(one.sweep is None for one in recipes)


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"loss.bta": [0.1]}, "with loss.bta=0.1: loss.bta: unknown key"),
        ({"optm.lr": [0.1]}, "optm: unknown key (did you mean optim?)"),
        ({"loss.beta": "uniform(-1, 1)"}, "with loss.beta=-1.0: loss.beta: input should be greater than 0"),
        ({"loss.type": ["fdo", "bogus"]}, "with loss.type=bogus: loss.type: no loss 'bogus'"),
        # a divergence's own parameter without its condition
        ({"loss.divergence": ["kl"], "loss.alpha": [0.5]}, "without divergence: alpha"),
    ],
)
def test_values_that_no_run_could_have_are_refused(space: dict[str, Any], said: str) -> None:
    recipe = recipe_with({"space": space})
    with pytest.raises(UserError) as error:
        recipes_of(recipe, representatives(recipe))
    assert said in str(error.value)
    assert str(error.value).startswith("sweep.space: ")


def test_another_loss_keeps_what_both_have_and_drops_the_rest() -> None:
    recipe = recipe_with(loss={"type": "kldo", "skew": 0.5, "beta": 0.3, "mix": {"sft": {"weight": 1.0}}})
    other = with_changes(recipe, {"loss.type": "dpo"})
    assert (other.loss.type, other.loss.beta, len(other.loss.terms)) == ("dpo", 0.3, 2)
    # what was said of one choice does not hold another to it
    alpha = recipe_with(loss={"type": "fdo", "divergence": "alpha"})
    assert with_changes(alpha, {"loss.divergence": "kl"}).loss.options["divergence"] == "kl"


def test_changes_of_a_loss_and_its_options_are_made_together() -> None:
    recipe = recipe_with(loss={"type": "dpo", "label_smoothing": 0.1})
    assert with_changes(recipe, {"loss.skew": 0.25, "loss.type": "kldo"}).loss.options["skew"] == 0.25


BASE = ["separation/d_b", "evaluate/asr", "evaluate/over_refusal", "evaluate/over_refusal_set/x"]


def names_of(goal: str, **more: Any) -> dict[str, str]:
    recipe = recipe_with(
        {"goal": goal, **more.pop("sweep", {})},
        evaluate={"prompts": "bundled:heldout", **more.pop("evaluate", {})},
        data={"eval": 0.1},
        **more,
    )
    return whole_names(recipe, recipes_of(recipe, representatives(recipe)), BASE)


def test_a_metric_is_found_by_its_end() -> None:
    goal = "maximize d_b, minimize eval/loss, maximize evaluate/kl subject to over_refusal <= 0.1"
    assert names_of(goal) == {
        "d_b": "separation/d_b",
        "eval/loss": "eval/loss",
        "evaluate/kl": "evaluate/kl",
        "over_refusal": "evaluate/over_refusal",
    }


@pytest.mark.parametrize(
    ("goal", "said"),
    [
        ("maximize separation/db", "sweep.goal: separation/db: no trial reports it (did you mean separation/d_b?"),
        ("maximize evaluate/win_rate", "no trial reports it"),
        ("maximize reward/margin subject to bogus <= 1", "sweep.goal: bogus: no trial reports it"),
        ("maximize margin", "sweep.goal: margin: may be eval/reward/margin or reward/margin; say which"),
    ],
)
def test_a_metric_that_no_trial_reports_is_refused_with_those_that_there_are(goal: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        names_of(goal)
    assert said in str(error.value)
    if "bogus" in goal:
        assert "evaluate/asr" in str(error.value)
        assert "tokens_per_second" in str(error.value)


def test_asha_needs_its_metric_during_training() -> None:
    asha = {"scheduler": "asha"}
    with pytest.raises(UserError, match=r"separation/d_b: no trial reports it while they train"):
        names_of("maximize separation/d_b", sweep=asha)
    with pytest.raises(UserError, match=r"eval/loss: no trial reports it while they train"):
        names_of("minimize eval/loss", sweep=asha)
    assert names_of("minimize eval/loss", sweep=asha, evaluate={"every": 5}) == {"eval/loss": "eval/loss"}
    assert names_of("maximize d_b", sweep=asha, separation={"every": 5}) == {"d_b": "separation/d_b"}
    named = names_of("maximize d_b, maximize evaluate/asr", sweep={**asha, "stop_on": "minimize grad_norm"})
    assert named["grad_norm"] == "grad_norm"


def test_of_a_large_space_every_choice_and_end_is_checked() -> None:
    space: dict[str, Any] = {"loss.type": ["kldo", "nonsense"]}
    space |= {f"optim.{name}": "uniform(0.1, 0.9)" for name in ("lr", "weight_decay", "clip", "eps", "target_margin")}
    space |= {f"model.lora.{name}": ["a", "b", "c", "d", "e", "f"] for name in ("r", "alpha", "dropout")}
    tried = representatives(recipe_with({"space": space}))
    assert MOST_CHECKED <= len(tried) <= MOST_CHECKED + 40
    for key, said in space.items():
        wanted = said if isinstance(said, list) else [0.1, 0.9]
        assert {one[key] for one in tried} == set(wanted), key


def test_numbers_are_written_whole() -> None:
    sweep = recipe_with(
        {"space": {"optim.steps": "randint(1, 1234568)", "optim.lr": "uniform(1.00000001e-5, 0.1)"}}
    ).sweep
    assert sweep is not None
    assert [parameter.written() for parameter in sweep.parameters] == [
        "randint(1, 1234568)",
        "uniform(1.00000001e-05, 0.1)",
    ]


def test_a_step_is_kept_to() -> None:
    sweep = recipe_with({"space": {"loss.beta": "quniform(0, 1, 0.03125)"}}).sweep
    assert sweep is not None
    assert all((one["loss.beta"] / 0.03125).is_integer() for one in draw(sweep.parameters, 20, seed=1))


def test_a_number_with_an_exponent_alone_is_a_number(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model: {id: x}\nloss: {type: dpo}\noptim: {steps: 1}\nsweep:\n  space:\n    optim.lr: [1e-3, 1E-4, 0.5]\n"
        "    loss.beta: {in: [0.1, 0.2], when: {optim.lr: 1e-3}}\n  search: grid\n  goal: minimize loss\n"
    )
    sweep = load_recipe(path).sweep
    assert sweep is not None
    assert [one.values for one in sweep.parameters] == [(0.001, 0.0001, 0.5), (0.1, 0.2)]
    assert len(grid(sweep.parameters)) == 4
