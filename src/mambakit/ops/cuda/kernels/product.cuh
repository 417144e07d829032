// A product of some rows with a matrix, whose sums meet an end: y[b][o] = end(sum_k W[o][k] x[b][k]). Two of one form:
// `matvec.cuh` for a few rows; with a constant CLUSTER `matmul.cuh`, on tensor cores, for more.
//
//     Product product(weight, rows of W, columns, batch);   // W is on its way
//     product.each([&](int64 row, int64 b) { ... });        // the ends of this thread
//     let_next_begin(), await_previous();
//     product.read(x, stride of x);                         // and so is x
//     product.finish([&](int64 row, int64 b) { return End{...}; }, scales, find);
//
// An End takes the sums of NEIGHBOURS rows of W from `row` on. It has begin(), which reads what it needs, and end(sums). HELD
// says whether to read it before the product where a thread has one sum, and to hold it until then. scales: of each row of
// x of this block, in shared memory, or null; the sums are multiplied by them. find() writes them, and is called when the
// reading for it delays least.
#pragma once
#ifdef CLUSTER
#include "matmul.cuh"
#else
#include "matvec.cuh"
#endif
