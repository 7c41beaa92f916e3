// This file holds the memory of a Queue: the bytes it stores, and the list of
// where messages end in them.

package replay

import "sync"

const (
	firstChunk = 512      // bytes
	maxChunk   = 72 << 10 // bytes, but for a frame that is larger: those of 64 KiB fit
	firstEnds  = 8        // entries
	endSize    = 8        // bytes of an entry
)

// maxChunks keeps chunks of maxChunk bytes for the next queue: their turnover is
// what a busy process would collect all the time. A chunk is given back only when
// all of it is acknowledged or given up, hence not while a part of it is being
// written: a ping is written after what it acknowledges.
var maxChunks = sync.Pool{New: func() any { return new([maxChunk]byte) }}

// newChunk returns memory for a chunk.
func newChunk(size int) []byte {
	if size == maxChunk {
		return maxChunks.Get().(*[maxChunk]byte)[:0]
	}
	return make([]byte, 0, size)
}

// free gives the chunk's memory back.
func (c *chunk) free() {
	if cap(c.data) == maxChunk {
		maxChunks.Put((*[maxChunk]byte)(c.data[:maxChunk]))
	}
	c.data = nil
}

// chunk holds the stored bytes from position at on.
type chunk struct {
	at   uint64
	data []byte // never moved: a writer may hold a part of it
	next *chunk
}

func (c *chunk) end() uint64 { return c.at + uint64(len(c.data)) }

// chunks is a run of bytes by position. Only the last chunk has room.
type chunks struct {
	head, last *chunk
	cursor     *chunk // where run was last: the next one is there or further
}

// room returns how many bytes fit without a new chunk.
func (c *chunks) room() int {
	if c.last == nil {
		return 0
	}
	return cap(c.last.data) - len(c.last.data)
}

// next returns how large the next chunk is to be, for at least need bytes.
func (c *chunks) next(need int) int {
	size := firstChunk
	if c.last != nil {
		size = min(2*cap(c.last.data), maxChunk)
	}
	if need > maxChunk/2 && need <= maxChunk {
		return maxChunk
	}
	return max(size, need)
}

// add makes an empty chunk of size bytes the last one; at is the end of the run. No
// frame is ever in two chunks, so that a control frame may be written between two
// runs.
func (c *chunks) add(data []byte, at uint64) {
	added := &chunk{at: at, data: data}
	if c.last == nil {
		c.head = added
	} else {
		c.last.next = added
	}
	c.last = added
}

// put stores a frame, for which the last chunk has room.
func (c *chunks) put(wire []byte) { c.last.data = append(c.last.data, wire...) }

// run returns the bytes from position at to the end of their chunk.
func (c *chunks) run(at uint64) []byte {
	if c.cursor == nil || c.cursor.at > at {
		c.cursor = c.head
	}
	for c.cursor.end() <= at {
		c.cursor = c.cursor.next
	}
	data := c.cursor.data
	return data[at-c.cursor.at : len(data) : len(data)]
}

// cut lets go of the chunks that end at base or before it, and returns how
// much memory that was.
func (c *chunks) cut(base uint64) (freed int64) {
	for c.head != nil && c.head.end() <= base {
		freed += int64(cap(c.head.data))
		if c.cursor == c.head {
			c.cursor = nil
		}
		c.head.free()
		c.head = c.head.next
	}
	if c.head == nil {
		c.last = nil
	}
	return freed
}

// ends lists the positions where stored messages end.
type ends struct {
	list  []uint64
	first int // those before it are no longer stored
}

func (e *ends) len() int { return len(e.list) - e.first }

func (e *ends) at(i int) uint64 { return e.list[e.first+i] }

// upTo returns how many messages end at pos or before it.
func (e *ends) upTo(pos uint64) (n int) {
	for n < e.len() && e.at(n) <= pos {
		n++
	}
	return n
}

// growth returns by how many entries the list has to grow for one more. Entries
// in front that are no longer needed are used first, if moving pays.
func (e *ends) growth() int {
	switch {
	case len(e.list) < cap(e.list) || e.first > cap(e.list)/2:
		return 0
	case e.list == nil:
		return firstEnds
	default:
		return cap(e.list)
	}
}

// add appends pos, with the growth that was asked for.
func (e *ends) add(pos uint64, growth int) {
	if len(e.list) == cap(e.list) {
		to := e.list[:0]
		if growth > 0 {
			to = make([]uint64, 0, cap(e.list)+growth)
		}
		e.list, e.first = append(to, e.list[e.first:]...), 0
	}
	e.list = append(e.list, pos)
}

// remove drops the first n entries, lets go of a list that is empty, and returns
// how much memory that was.
func (e *ends) remove(n int) (freed int64) {
	e.first += n
	if e.len() > 0 {
		return 0
	}
	freed = int64(cap(e.list)) * endSize
	*e = ends{}
	return freed
}
