"""What the tests of the workshop share."""

import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The URL of an empty bucket on an object store in this process."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="radar")
    yield "s3://radar"
    server.stop()
    for name, value in before.items():
        os.environ.pop(name)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Layers as small as those of tests only wait for each other on more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def uncalibrated() -> Iterator[None]:
    """Calibration takes longer than the trainings of tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.train._calibrated", lambda *_: None)
        yield
