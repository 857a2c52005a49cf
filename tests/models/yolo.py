"""A YOLO-style detector: C2f blocks, SPPF, a two-way neck, decoupled heads with box distributions."""

import torch
import torch.nn as nn


class Conv(nn.Module):
    """Convolution, batch norm, SiLU."""

    def __init__(self, c1, c2, k=1, s=1, g=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU() if act is True else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Bottleneck(nn.Module):
    def __init__(self, c1, c2, shortcut=True, e=0.5):
        super().__init__()
        c_ = int(c2 * e)
        self.cv1 = Conv(c1, c_, 3)
        self.cv2 = Conv(c_, c2, 3)
        self.add = shortcut and c1 == c2

    def forward(self, x):
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Split in two, a chain of bottlenecks on the last part, everything concatenated."""

    def __init__(self, c1, c2, n=1, shortcut=False, e=0.5, split=False):
        super().__init__()
        self.c = int(c2 * e)
        self.split = split
        self.cv1 = Conv(c1, 2 * self.c, 1)
        self.cv2 = Conv((2 + n) * self.c, c2, 1)
        self.m = nn.ModuleList(Bottleneck(self.c, self.c, shortcut, e=1.0) for _ in range(n))

    def forward(self, x):
        if self.split:
            y = list(self.cv1(x).split((self.c, self.c), 1))
        else:
            y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class SPPF(nn.Module):
    def __init__(self, c1, c2, k=5):
        super().__init__()
        c_ = c1 // 2
        self.cv1 = Conv(c1, c_)
        self.cv2 = Conv(c_ * 4, c2)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x):
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class Concat(nn.Module):
    def __init__(self, dimension=1):
        super().__init__()
        self.d = dimension

    def forward(self, x):
        return torch.cat(x, self.d)


class DFL(nn.Module):
    """The expected value of a distribution over distances, as a convolution with fixed weights."""

    def __init__(self, c1=16):
        super().__init__()
        self.conv = nn.Conv2d(c1, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(c1, dtype=torch.float).view(1, c1, 1, 1)
        self.c1 = c1

    def forward(self, x):
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.c1, a).transpose(2, 1).softmax(1)).view(b, 4, a)


class Detect(nn.Module):
    def __init__(self, nc=6, reg_max=8, ch=()):
        super().__init__()
        self.nc, self.nl, self.reg_max = nc, len(ch), reg_max
        self.no = nc + reg_max * 4
        c2, c3 = max(16, ch[0] // 4, reg_max * 4), max(ch[0], nc)
        self.cv2 = nn.ModuleList(
            nn.Sequential(Conv(x, c2, 3), Conv(c2, c2, 3), nn.Conv2d(c2, 4 * reg_max, 1))
            for x in ch
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(Conv(x, x, 3, g=x), Conv(x, c3), Conv(c3, c3, 3), nn.Conv2d(c3, nc, 1))
            for x in ch
        )
        self.dfl = DFL(reg_max)

    def forward(self, x):
        for i in range(self.nl):
            x[i] = torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1)
        flat = torch.cat([xi.view(xi.shape[0], self.no, -1) for xi in x], 2)
        box, cls = flat.split((self.reg_max * 4, self.nc), 1)
        lt, rb = self.dfl(box).chunk(2, 1)
        return torch.cat((rb - lt, (lt + rb) / 2, cls.sigmoid()), 1)


class YOLO(nn.Module):
    """Boxes and class scores [n, 4 + nc, anchors] from strides 8, 16, 32."""

    def __init__(self, nc=6, w=16, n=1):
        super().__init__()
        self.stem = Conv(3, w, 3, 2)
        self.down2 = Conv(w, 2 * w, 3, 2)
        self.c2 = C2f(2 * w, 2 * w, n, True)
        self.down3 = Conv(2 * w, 4 * w, 3, 2)
        self.c3 = C2f(4 * w, 4 * w, 2 * n, True, split=True)
        self.down4 = Conv(4 * w, 4 * w, 3, 2)
        self.c4 = C2f(4 * w, 4 * w, 2 * n, True)
        self.down5 = Conv(4 * w, 6 * w, 3, 2)
        self.c5 = C2f(6 * w, 6 * w, n, True)
        self.sppf = SPPF(6 * w, 6 * w)
        self.up = nn.Upsample(None, 2, "nearest")
        self.cat = Concat(1)
        self.n4 = C2f(10 * w, 4 * w, n)
        self.n3 = C2f(8 * w, 4 * w, n)
        self.pan3 = Conv(4 * w, 4 * w, 3, 2)
        self.n4b = C2f(8 * w, 4 * w, n)
        self.pan4 = Conv(4 * w, 4 * w, 3, 2)
        self.n5b = C2f(10 * w, 6 * w, n)
        self.detect = Detect(nc, ch=(4 * w, 4 * w, 6 * w))

    def forward(self, x):
        x = self.c2(self.down2(self.stem(x)))
        p3 = self.c3(self.down3(x))
        p4 = self.c4(self.down4(p3))
        p5 = self.sppf(self.c5(self.down5(p4)))
        u4 = self.n4(self.cat([self.up(p5), p4]))
        u3 = self.n3(self.cat([self.up(u4), p3]))
        d4 = self.n4b(self.cat([self.pan3(u3), u4]))
        d5 = self.n5b(self.cat([self.pan4(d4), p5]))
        return self.detect([u3, d4, d5])
