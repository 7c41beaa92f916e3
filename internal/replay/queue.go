// This file holds the queue of a client's messages on their way to backends.

package replay

// Queue holds a client's messages on their way to backends. It is used under
// its owner's lock. While nothing is stored it holds no memory but its own.
type Queue struct {
	budget *Budget
	stored chunks
	ends   ends // of the complete messages that are stored
	handed int  // how many of those are completely sent to the current backend

	tail  uint64 // end of what was appended
	base  uint64 // where what is stored begins
	gone  uint64 // end of the last complete message before base
	sent  uint64 // end of what the current backend got
	acked uint64 // the current backend has read what is before it

	reached uint64 // how far sent ever was with the current backend
	seen    uint64 // end of the last message that an earlier backend got whole
	stream  uint64 // end of the last complete message that was streamed

	strikes []strike
	open    message // the one that is being appended
	closed  bool
}

// message is the state of the message that is being appended.
type message uint8

const (
	none     message = iota
	kept             // stored
	streamed         // larger than what may be stored
	passed           // under Off
	givenUp          // its beginning went to a backend that is gone
)

// Init gives the queue its budget. It comes first.
func (q *Queue) Init(b *Budget) { q.budget = b }

// Append takes the next frame of the client's data, one unit of wire bytes,
// header included. first and last say whether it begins and ends a message,
// live that a backend is there and may be written. limit is the most that may
// be stored, in bytes. Units that are passed are to be sent in their order and
// before anything that is pending.
func (q *Queue) Append(wire []byte, first, last, live bool, mode Mode, limit int64) Fate {
	if q.closed {
		return Dropped
	}
	if first != (q.open == none) {
		panic("replay: a message begins inside another, or goes on without a beginning")
	}
	fate := q.take(wire, last, live, mode, limit)
	if last && fate != Full {
		q.open = none
	}
	return fate
}

func (q *Queue) take(wire []byte, last, live bool, mode Mode, limit int64) Fate {
	switch {
	case q.open == givenUp:
		return Dropped
	case q.open == streamed, q.open == passed:
		return q.pass(wire, last, live)
	case q.open == none && mode == Off:
		return q.begin(passed, wire, last, live && !q.Backlog())
	case q.Buffered()+int64(len(wire)) <= limit && q.keep(wire, last):
		q.open = kept
		return Kept
	default:
		return q.begin(streamed, wire, last, live && q.mayStream(wire, last, limit))
	}
}

// mayStream reports whether a unit that cannot be stored may make its message
// one that is not stored. One of which a part is stored need not be larger than
// the limit for that: connections that all hold a part of a message would wait
// for each other's memory for ever. With nothing stored, waiting harms nobody.
func (q *Queue) mayStream(wire []byte, last bool, limit int64) bool {
	switch {
	case q.sent < q.tail:
		return false
	case q.open == kept:
		return q.ends.len() == 0
	default:
		bytes := int64(len(wire))
		memory := bytes
		if last {
			memory += firstEnds * endSize
		}
		return q.Buffered() == 0 && (bytes > limit || memory > q.budget.limit.Load())
	}
}

// begin makes the open message one that is not stored, if it may be written.
func (q *Queue) begin(as message, wire []byte, last, may bool) Fate {
	if !may {
		return Full
	}
	// All that is stored was sent. Under Off it is not needed any more, else it
	// is the beginning of this message.
	q.forget(q.ends.len())
	q.base = q.tail
	q.trim()
	q.open = as
	return q.pass(wire, last, true)
}

func (q *Queue) pass(wire []byte, last, live bool) Fate {
	if !live {
		return Full
	}
	q.tail += uint64(len(wire))
	q.base = q.tail
	if last {
		q.gone = q.tail
		if q.open == streamed {
			q.stream = q.tail
		}
	}
	return Passed
}

// keep stores wire if the budget grants the memory.
func (q *Queue) keep(wire []byte, last bool) bool {
	var size, growth int
	if len(wire) > q.stored.room() {
		size = q.stored.next(len(wire))
	}
	if last {
		growth = q.ends.growth()
	}
	if !q.reserve(size, growth) {
		// A chunk of usual size may be too much where the bytes alone are not.
		if size == 0 {
			return false
		}
		if size = len(wire); !q.reserve(size, growth) {
			return false
		}
	}
	if size > 0 {
		q.stored.add(newChunk(size), q.tail)
	}
	q.stored.put(wire)
	q.tail += uint64(len(wire))
	if last {
		q.ends.add(q.tail, growth)
	}
	return true
}

func (q *Queue) reserve(size, growth int) bool {
	n := int64(size) + int64(growth)*endSize
	return n == 0 || q.budget.reserve(n)
}

// Pending returns the next stored bytes that the current backend did not get,
// as one run of whole frames: there may be more after them. It returns nil if
// there are none.
// With wholeOnly, for a backend that is being left, it goes no further than the
// end of the message that was begun there.
func (q *Queue) Pending(wholeOnly bool) []byte {
	// Before base there are only bytes that were passed and are to be sent first.
	if q.sent < q.base || q.sent == q.tail || wholeOnly && q.Boundary() {
		return nil
	}
	run := q.stored.run(q.sent)
	if wholeOnly && q.handed < q.ends.len() {
		run = run[:min(uint64(len(run)), q.ends.at(q.handed)-q.sent)]
	}
	return run
}

// Sent marks the next n bytes, stored or passed, as sent. It comes before they
// are written.
func (q *Queue) Sent(n int) {
	if n < 0 || uint64(n) > q.tail-q.sent {
		panic("replay: more was sent than appended")
	}
	q.sent += uint64(n)
	q.reached = max(q.reached, q.sent)
	for q.handed < q.ends.len() && q.ends.at(q.handed) <= q.sent {
		q.handed++
	}
}

// Unsent takes back the last n bytes that were marked as sent, because writing
// them failed. It comes before any Release.
func (q *Queue) Unsent(n int) {
	if n < 0 || uint64(n) > q.sent {
		panic("replay: more was taken back than sent")
	}
	// This may lead to before base, if what failed is not stored any more: then
	// it is missing, and Lost says so.
	q.sent -= uint64(n)
	for q.handed > 0 && q.ends.at(q.handed-1) > q.sent {
		q.handed--
	}
}

// Release follows a write that went well. Messages that are completely written
// are freed, but under Unacked.
func (q *Queue) Release(mode Mode) {
	if mode != Unacked {
		q.forget(q.handed)
	}
}

// Mark returns the position of what was sent so far: what a ping that is
// written now acknowledges.
func (q *Queue) Mark() uint64 { return q.sent }

// Ack says that the current backend has read everything before pos. Messages
// that are completely before it are freed in every mode.
func (q *Queue) Ack(pos uint64, _ Mode) {
	if pos > q.reached {
		panic("replay: more was acknowledged than sent")
	}
	// A ping may have been marked and then not written, and a pong that nobody
	// asked for look like its answer.
	q.acked = max(q.acked, min(pos, q.sent))
	q.forget(q.ends.upTo(q.acked))
}

// Boundary reports whether what was sent ends with a message: nothing that was
// begun on the current backend is unfinished, and nothing was passed that is
// not sent yet.
func (q *Queue) Boundary() bool {
	if q.sent < q.base {
		return false // what was passed has nowhere else to go
	}
	if q.handed > 0 {
		return q.sent == q.ends.at(q.handed-1)
	}
	return q.sent == q.gone
}

// Outstanding reports whether a message was completely sent and is not
// acknowledged.
func (q *Queue) Outstanding() bool { return q.whole() > q.acked }

// Empty reports whether the next backend would get no message of what was
// appended so far: nothing is stored and none has begun.
func (q *Queue) Empty() bool {
	return q.Buffered() == 0 && (q.open == none || q.open == givenUp)
}

// Backlog reports whether stored bytes wait to be sent.
func (q *Queue) Backlog() bool { return q.base < q.tail && q.sent < q.tail }

// Buffered returns how many bytes are stored.
func (q *Queue) Buffered() int64 { return int64(q.tail - q.base) }

// Drop gives all memory back: the connection ended. Positions stay valid, so
// that a write which is still under way can be accounted for, but nothing more
// is taken.
func (q *Queue) Drop() {
	q.forget(q.ends.len())
	q.base, q.gone = q.tail, q.tail
	q.trim()
	q.closed = true
}

// whole returns the end of the last message that was completely sent to the
// current backend. Of several that were passed at once only the last one's end
// is known: until that was sent, it returns zero.
func (q *Queue) whole() uint64 {
	switch {
	case q.handed > 0:
		return q.ends.at(q.handed - 1)
	case q.sent >= q.gone:
		return q.gone
	default:
		return 0
	}
}

// forget frees the first n messages that are stored.
func (q *Queue) forget(n int) {
	if n == 0 {
		return
	}
	q.gone = q.ends.at(n - 1)
	q.base = q.gone
	q.handed = max(q.handed-n, 0)
	q.budget.release(q.ends.remove(n))
	q.trim()
}

// trim gives the memory before base back.
func (q *Queue) trim() {
	q.budget.release(q.stored.cut(q.base))
	if q.base == q.tail {
		q.strikes = nil // nothing is left that they could count against
	}
}
