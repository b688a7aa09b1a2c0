"""What vLLM 0.32 and transformers 5.19 refuse of lists in config.json with an item for a layer."""

from config_stages import judge


def test_a_list_with_an_item_for_every_layer_may_be_longer_but_not_shorter() -> None:
    assert judge("mimo_v2_flash", hybrid_layer_pattern=[0, 1, 0, 1]) == "taken"
    assert judge("mimo_v2_flash", moe_layer_freq=[0]).endswith("without an item for every layer")
    assert judge("mimo_v2_flash", moe_layer_freq=1) == "taken"


def test_transformers_reads_the_kinds_of_mlp_only_beside_those_of_attention() -> None:
    sparse = ["sparse"] * 3

    assert judge("hy_v3", mlp_layer_types=["none"]) == "taken"
    assert judge("mimo_v2_flash", mlp_layer_types=sparse) == "taken"
    assert judge("mimo_v2_flash", mlp_layer_types=["none"] * 3).startswith("refused")
    assert judge("mimo_v2_flash", mlp_layer_types=sparse[1:]).startswith("refused")
    assert judge("llama", mlp_layer_types=sparse) == "unknown: mlp_layer_types of config.json"
