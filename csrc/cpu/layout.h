// How each format of weights lies in memory: what it is made of, how large a panel is, and the way there and back. A
// format says so in the first part of its file in formats/; see weights.h for whole matrices.
#pragma once

#include <cstring>
#include <vector>

#include "types.h"

namespace esm {
namespace cpu {

// A tensor (out, columns) that a matrix is made of.
struct Part {
    Element element;
    int64_t columns;
};

struct Layout {
    Element plain;  // of the vectors beside the weights, and of results of their type
    std::vector<Part> (*parts)(int in);
    // Bytes of one panel.
    size_t (*panel_size)(int in);
    // One panel from the parts' rows, which begin at parts[0], parts[1], ...; or those rows back from it.
    void (*pack)(const void* const* parts, int out, int in, int panel, void* to);
    void (*unpack)(const void* from, int out, int in, int panel, void* const* parts);
};

const Layout& layout_of(Type type);

inline int panels_of(int out) { return (out + kPanel - 1) / kPanel; }  // out: at most kMostColumns
// Rows of a matrix that a panel holds.
inline int rows_of(int out, int panel) { return out - panel * kPanel < kPanel ? out - panel * kPanel : kPanel; }

// Plain elements of type T, kTogether inputs of an output side by side, inputs padded to a multiple of kWhole.
template <class T, int kTogether, int kWhole, Element element>
struct PlainLayout {
    static constexpr Element plain = element;
    static std::vector<Part> parts(int in) { return {{element, in}}; }
    static size_t size(int in) { return size_t(in + kWhole - 1) / kWhole * kWhole * kPanel; }
    static size_t panel_size(int in) { return size(in) * sizeof(T); }

    // visit(element of the matrix, element of the panel), a few inputs at a time, so that what is scattered stays in the
    // first-level cache.
    template <class Visit>
    static void each(int out, int in, int panel, const Visit& visit) {
        constexpr int kStretch = 64;
        for (int start = 0; start < in; start += kStretch)
            for (int row = 0; row < rows_of(out, panel); ++row) {
                const size_t from = (size_t(panel) * kPanel + size_t(row)) * size_t(in);
                for (int i = start; i < in && i < start + kStretch; ++i)
                    visit(from + size_t(i), (size_t(i / kTogether) * kPanel + size_t(row)) * kTogether + size_t(i % kTogether));
            }
    }
    static void pack(const void* const* parts, int out, int in, int panel, void* to) {
        const T* plain = static_cast<const T*>(parts[0]);
        T* packed = static_cast<T*>(to);
        std::memset(packed, 0, panel_size(in));
        each(out, in, panel, [&](size_t from, size_t at) { packed[at] = plain[from]; });
    }
    static void unpack(const void* from, int out, int in, int panel, void* const* parts) {
        const T* packed = static_cast<const T*>(from);
        T* plain = static_cast<T*>(parts[0]);
        each(out, in, panel, [&](size_t to, size_t at) { plain[to] = packed[at]; });
    }
};

// A format's own: the functions of a Layout.
template <Type type>
struct LayoutOf;

}  // namespace cpu
}  // namespace esm
