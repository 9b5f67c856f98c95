// What the kernels use of clusters, in place of NVIDIA's header; shim.h is included before everything.
#pragma once

namespace cooperative_groups {

struct Cluster {
  void barrier_arrive() const { host::cluster_arrive(); }
  void barrier_wait() const { host::cluster_wait(); }
  template <class T> T* map_shared_rank(T* here, int rank) const {
    return static_cast<T*>(host::in_block(here, rank));
  }
};
inline Cluster this_cluster() { return {}; }

}  // namespace cooperative_groups
