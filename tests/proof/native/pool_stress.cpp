// The thread pool under all that may happen to it, to be built with a sanitizer. Prints "right", or what went wrong.
//   threads  regions, nested ones, sessions, several callers, resizing, exceptions
//   fork     the pool in forked children; not for Thread- and AddressSanitizer, which do not survive forks
//   race     an unguarded write of two threads, which ThreadSanitizer must find
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../../csrc/threads.h"

namespace {

constexpr int kRounds = 200;

void require(bool right, const char* what) {
    if (right) return;
    std::fprintf(stderr, "wrong: %s\n", what);
    std::_Exit(1);
}

// Every place is written by one piece alone, without a lock, and read by the caller: the pool must order the two.
void region(size_t n, size_t grain) {
    std::vector<int> visits(n);
    esm::parallel_for(n, grain, [&](size_t begin, size_t end) {
        for (size_t i = begin; i < end; ++i) ++visits[i];
    });
    for (int count : visits) require(count == 1, "a region visits every place once");
}

void regions() {
    for (int round = 0; round < kRounds; ++round)
        for (size_t n : {0, 1, 2, 7, 64, 1000}) region(n, size_t(round % 5));
}

void nested_regions() {
    for (int round = 0; round < kRounds; ++round) {
        std::vector<int> visits(8 * 16);
        esm::parallel_for(8, 1, [&](size_t begin, size_t end) {
            for (size_t i = begin; i < end; ++i)
                esm::parallel_for(16, 1, [&](size_t from, size_t to) {
                    for (size_t j = from; j < to; ++j) ++visits[i * 16 + j];
                });
        });
        for (int count : visits) require(count == 1, "a region inside a region visits every place once");
    }
}

void sessions() {
    for (int round = 0; round < kRounds; ++round) {
        const esm::Session session;
        for (int i = 0; i < 4; ++i) region(64, 1);
        const esm::Session inner;
        region(1, 1);
        if (round % 8 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));  // long enough to fall asleep
        region(64, 1);
    }
}

void exceptions() {
    for (int round = 0; round < kRounds; ++round) {
        std::atomic<int> ended{0};
        bool caught = false;
        try {
            esm::parallel_for(20, 1, [&](size_t begin, size_t) {
                ++ended;
                if (begin % 3 == 1) throw std::runtime_error("planted");
            });
        } catch (const std::runtime_error& error) {
            caught = !std::strcmp(error.what(), "planted");
        }
        // A region that found the pool taken runs in one piece.
        require(caught ? ended == 20 : ended == 1, "an exception comes back after every piece has ended");
    }
}

void at_once(int callers, void (*work)()) {
    std::vector<std::thread> threads;
    for (int i = 0; i < callers; ++i) threads.emplace_back(work);
    for (std::thread& thread : threads) thread.join();
}

void resize() {
    for (int round = 0; round < kRounds / 4; ++round) {
        esm::set_threads(1 + round % 5);
        region(100, 3);
    }
}

// A forked child has the pool's memory but none of its threads.
void fork_and_use() {
    for (int round = 0; round < 5; ++round) {
        const pid_t child = fork();
        require(child >= 0, "fork");
        if (!child) {
            regions();
            resize();
            sessions();
            std::_Exit(0);
        }
        int status = 0;
        require(waitpid(child, &status, 0) == child && status == 0, "a forked child uses the pool");
    }
}

void fork_amid_regions() {
    std::atomic<bool> stop{false};
    std::thread other([&] {
        while (!stop) region(100, 1);
    });
    fork_and_use();
    stop = true;
    other.join();
}

void race() {
    int unguarded = 0;
    std::atomic<int> come{0};
    esm::parallel_for(2, 1, [&](size_t, size_t) {
        ++unguarded;
        for (++come; come < 2;) std::this_thread::yield();  // so that the other piece is another thread's
    });
}

void threads() {
    regions();
    nested_regions();
    sessions();
    exceptions();
    at_once(3, regions);
    at_once(3, nested_regions);
    at_once(3, sessions);
    at_once(3, exceptions);
    at_once(3, [] {
        regions();
        resize();
        sessions();
        nested_regions();
    });
}

void forks() {
    fork_and_use();
    regions();
    fork_amid_regions();
}

}  // namespace

int main(int count, char** arguments) {
    const std::string wanted = count == 2 ? arguments[1] : "";
    void (*const run)() = wanted == "threads" ? threads : wanted == "fork" ? forks : wanted == "race" ? race : nullptr;
    require(run, "give one of threads, fork, race");
    esm::set_threads(4);
    run();
    std::puts("right");
}
