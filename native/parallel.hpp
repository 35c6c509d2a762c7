// Work on several threads: those of the OpenMP runtime that torch has loaded, so that there is one pool in the process
// and no core has two threads waiting on it. Its entry points are looked up at run time (libgomp's, which LLVM's and
// Intel's runtimes have too); where there is none, threads are started for the call.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>
#ifndef _WIN32
#include <dlfcn.h>
#endif

namespace lorq {

class Team;
using Job = void (*)(Team&, int thread, void* data);

struct OpenMP {
    void (*parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;
    void (*barrier)() = nullptr;
    int (*thread_num)() = nullptr;
    int (*num_threads)() = nullptr;

    static const OpenMP& loaded() {
        static const OpenMP found = [] {
            OpenMP omp;
#ifndef _WIN32
            omp.parallel = reinterpret_cast<decltype(omp.parallel)>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
            omp.barrier = reinterpret_cast<decltype(omp.barrier)>(dlsym(RTLD_DEFAULT, "GOMP_barrier"));
            omp.thread_num = reinterpret_cast<decltype(omp.thread_num)>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
            omp.num_threads = reinterpret_cast<decltype(omp.num_threads)>(dlsym(RTLD_DEFAULT, "omp_get_num_threads"));
#endif
            return omp;
        }();
        return found;
    }
    bool usable() const { return parallel && barrier && thread_num && num_threads; }
};

class Team {
   public:
    // As many threads as have something to do: a second one pays from a quarter of a million weights on.
    static int useful(int threads, int64_t weights) {
        return int(std::max<int64_t>(1, std::min<int64_t>(threads, weights >> 17)));
    }

    static void run(int threads, Job job, void* data) {
        Team team(job, data);
        const OpenMP& omp = OpenMP::loaded();
        if (threads <= 1) {
            job(team, 0, data);
        } else if (omp.usable()) {
            omp.parallel(
                [](void* self) {
                    Team& t = *static_cast<Team*>(self);
                    const OpenMP& o = OpenMP::loaded();
                    t.size.store(o.num_threads(), std::memory_order_relaxed);  // may be fewer than asked for
                    t.openmp = true;
                    o.barrier();
                    t.job_(t, o.thread_num(), t.data_);
                },
                &team, static_cast<unsigned>(threads), 0);
        } else {
            team.size = threads;
            std::vector<std::thread> others;
            for (int i = 1; i < threads; ++i) others.emplace_back([&team, i] { team.job_(team, i, team.data_); });
            job(team, 0, data);
            for (std::thread& other : others) other.join();
        }
    }

    // Until all threads of the team have come here.
    void wait() {
        const int n = size.load(std::memory_order_relaxed);
        if (n <= 1) return;
        if (openmp) return OpenMP::loaded().barrier();
        const int round = rounds_.load();
        if (arrived_.fetch_add(1) + 1 == n) {
            arrived_ = 0;
            ++rounds_;
        } else {
            while (rounds_.load() == round) std::this_thread::yield();
        }
    }

    // The part of 0 .. count - 1 that a thread has, in whole blocks.
    void share(int64_t count, int64_t block, int thread, int64_t& first, int64_t& last) const {
        const int64_t n = size.load(std::memory_order_relaxed), blocks = (count + block - 1) / block;
        first = blocks * thread / n * block;
        last = blocks * (thread + 1) / n * block;
        if (last > count) last = count;
    }

    std::atomic<int> size{1};
    std::atomic<bool> openmp{false};

   private:
    Team(Job job, void* data) : job_(job), data_(data) {}
    Job job_;
    void* data_;
    std::atomic<int> arrived_{0}, rounds_{0};
};

}  // namespace lorq
