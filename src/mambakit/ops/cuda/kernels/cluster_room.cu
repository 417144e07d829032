// Nothing: a kernel of clusters of CLUSTER blocks, to ask how many of them are on a device at once.
extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) cluster_room() {}
