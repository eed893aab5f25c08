// How the rows of the chunks, queries or keys, are divided among blocks.

#pragma once

#include <cstdint>

#include "retention/collective/key_tiles.hpp"
#include "retention/kernel/sequence.hpp"

namespace retention::kernel {

/// Which tiles of a chunk have the most work and, where chunks are long, come first. Queries have
/// that of the tokens before them, keys that of those after.
enum class HeavyTiles { kLast, kFirst };

/// Tiles of up to kRows rows: consecutive tokens of a chunk, and of each token all `group` query
/// heads that read one key head. They share the state, the keys and the values that a block loads.
/// Rows that are keys have a `group` of 1.
template <int kRows, HeavyTiles kHeavy = HeavyTiles::kLast>
struct RowTiles {
  static_assert(kRows <= 256, "collective::TileRows divides exactly up to there");

  /// Where a block's rows are.
  struct Tile {
    int sequence;
    int chunk;  // of the sequence
    int index;  // in the chunk
  };

  Sequences const& sequences;
  int group;  // at most kRows

  /// Blocks that a grid needs for each key head.
  CUTE_HOST_DEVICE std::int64_t count() const {
    return is_quadratic() ? tiles().num_slots() : sequences.num_slots() * chunk_tiles();
  }

  /// The tiles of a chunk are neighbours, for they share its state, its keys and its values.
  CUTE_DEVICE Tile find(int block) const {
    if (is_quadratic()) {
      Sequences const cut = tiles();
      if (!sequences.packed()) {
        return {block % sequences.count, 0, ordered(block / sequences.count, cut.max_chunks())};
      }
      Chunk const tile = cut.find(ordered(block, static_cast<int>(cut.num_slots())));
      return {tile.sequence, 0, tile.index};
    }
    int const in_chunk = chunk_tiles();
    Chunk const chunk = sequences.find(block / in_chunk);
    return {chunk.sequence, chunk.index, ordered(block % in_chunk, in_chunk)};
  }

  /// There may be none.
  CUTE_DEVICE collective::TileRows rows(Tile const& tile, Sequence const& sequence) const {
    int const chunk_size = sequences.chunk_size;
    int const tile_size = tile_tokens();
    int const first_query = tile.index * tile_size;
    std::int64_t const left =
        sequence.length - static_cast<std::int64_t>(tile.chunk) * chunk_size - first_query;
    int const tokens = cute::min(tile_size, chunk_size - first_query);
    int const queries = left < tokens ? static_cast<int>(left) : tokens;
    return {group, first_query, queries};
  }

 private:
  CUTE_HOST_DEVICE static int ordered(int index, int count) {
    return kHeavy == HeavyTiles::kLast ? count - 1 - index : index;
  }
  // One chunk a sequence.
  CUTE_HOST_DEVICE bool is_quadratic() const { return sequences.chunk_size >= sequences.length; }
  CUTE_HOST_DEVICE int tile_tokens() const {
    return cute::min(kRows / group, sequences.chunk_size);
  }
  CUTE_HOST_DEVICE int chunk_tiles() const {
    return cute::ceil_div(sequences.chunk_size, tile_tokens());
  }
  /// The sequences cut into tiles. In a long chunk cut into fixed tiles, packed sequences would
  /// each have as many tiles as the longest could need.
  CUTE_HOST_DEVICE Sequences tiles() const {
    return {sequences.cu_seqlens, sequences.length, tile_tokens(), sequences.count};
  }
};

}  // namespace retention::kernel
