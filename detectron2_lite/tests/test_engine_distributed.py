"""Two gloo processes on the CPU: collectives, gathered metrics, distributed evaluation."""

import json

import numpy as np
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.engine import SimpleTrainer, create_ddp_model, launch
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn

WORLD = 2
BOX = [10.0, 10.0, 60.0, 60.0]
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA, launch uses NCCL")


class Half(nn.Module):
    """loss = w * x"""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"loss": (self.weight * x).sum(), "loss_const": torch.tensor(1.0)}


def collect(rank):
    np.random.seed(rank)
    seed = comm.shared_random_seed()
    value = {"rank": rank, "array": np.arange(rank + 1).tolist()}
    return {
        "world": [comm.get_world_size(), comm.get_local_size()],
        "rank": [comm.get_rank(), comm.get_local_rank()],
        "main": comm.is_main_process(),
        "all_gather": comm.all_gather(value),
        "gather": comm.gather(value),
        "gather_at_1": comm.gather(rank, dst=1),
        "seeds": len(set(comm.all_gather(seed))),
    }


def train(rank):
    model = create_ddp_model(Half(), device_ids=None, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = SimpleTrainer(model, [torch.tensor([1.0 + 2 * rank])], optimizer)
    with EventStorage() as trainer.storage:
        trainer.run_step()
        latest = {name: value for name, (value, _) in trainer.storage.latest().items()}
    return {"weight": model.module.weight.item(), "latest": latest}


def evaluate(rank, json_file):
    MetadataCatalog.get("engine_distributed_coco").json_file = json_file
    evaluator = COCOEvaluator("engine_distributed_coco", output_dir=None)
    evaluator.reset()
    instances = Instances((100, 100))
    instances.pred_boxes = Boxes(torch.tensor([BOX]))
    instances.scores = torch.tensor([0.9])
    instances.pred_classes = torch.tensor([0])
    evaluator.process([{"image_id": rank}], [{"instances": instances}])
    return {task: scores["AP"] for task, scores in evaluator.evaluate().items()}


def worker(folder):
    rank = comm.get_rank()
    report = {
        "collect": collect(rank),
        "train": train(rank),
        "evaluate": evaluate(rank, f"{folder}/coco.json"),
    }
    comm.synchronize()
    with open(f"{folder}/report_{rank}.json", "w") as file:
        json.dump(report, file)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each rank saw."""
    folder = tmp_path_factory.mktemp("distributed")
    x0, y0, x1, y1 = BOX
    box = [x0, y0, x1 - x0, y1 - y0]
    area = box[2] * box[3]
    annotations = [
        {"id": i + 1, "image_id": i, "category_id": 0, "bbox": box, "area": area, "iscrowd": 0}
        for i in range(WORLD)
    ]
    images = [{"id": i, "height": 100, "width": 100} for i in range(WORLD)]
    categories = [{"id": 0, "name": "thing"}]
    coco = {"images": images, "annotations": annotations, "categories": categories, "info": {}}
    (folder / "coco.json").write_text(json.dumps(coco))
    launch(worker, WORLD, dist_url="auto", args=(str(folder),))
    return [json.loads((folder / f"report_{rank}.json").read_text()) for rank in range(WORLD)]


def test_ranks_and_sizes(reports):
    for rank, report in enumerate(reports):
        assert report["collect"]["world"] == [WORLD, WORLD]
        assert report["collect"]["rank"] == [rank, rank]
        assert report["collect"]["main"] == (rank == 0)


def test_objects_are_gathered_in_rank_order(reports):
    values = [{"rank": 0, "array": [0]}, {"rank": 1, "array": [0, 1]}]
    first, second = (report["collect"] for report in reports)
    assert first["all_gather"] == second["all_gather"] == first["gather"] == values
    assert second["gather"] == []
    assert (first["gather_at_1"], second["gather_at_1"]) == ([], [0, 1])


def test_the_shared_seed_is_shared(reports):
    assert all(report["collect"]["seeds"] == 1 for report in reports)


def test_gradients_and_metrics_are_averaged_over_the_ranks(reports):
    # gradients 1 and 3, mean 2: w = 1 - 0.1 * 2
    assert [report["train"]["weight"] for report in reports] == pytest.approx([0.8, 0.8])
    main, other = (report["train"]["latest"] for report in reports)
    assert (main["loss"], main["loss_const"], main["total_loss"]) == (2.0, 1.0, 3.0)
    assert main["data_time"] >= main["rank_data_time"]
    assert other.keys() == {"rank_data_time"}


def test_evaluation_counts_the_predictions_of_all_ranks(reports):
    assert reports[0]["evaluate"] == {"bbox": pytest.approx(100.0)}
    assert reports[1]["evaluate"] == {}


def test_one_process_is_a_world_of_its_own():
    seen = []
    launch(seen.append, 1, args=("called",))
    assert seen == ["called"]
    assert (comm.get_world_size(), comm.get_local_size()) == (1, 1)
    assert (comm.get_rank(), comm.get_local_rank()) == (0, 0)
    assert comm.all_gather("x") == comm.gather("x") == ["x"]
    comm.synchronize()
    assert comm.is_main_process()


def test_an_automatic_address_is_for_one_machine():
    with pytest.raises(AssertionError, match="auto"):
        launch(print, 1, num_machines=2, dist_url="auto")
