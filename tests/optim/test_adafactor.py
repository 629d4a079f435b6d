import torch

from ltx_titan.optim.adafactor import Adafactor
from tests.optim.toy import loss_of, toy


def test_it_is_torchs_adafactor():
    one, two = toy(), toy()
    theirs = torch.optim.Adafactor(one.parameters(), lr=1e-2, weight_decay=0.1)
    ours = Adafactor(two.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        for model, optimizer in ((one, theirs), (two, ours)):
            loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-6, msg=name)
