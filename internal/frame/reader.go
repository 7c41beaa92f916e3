package frame

import (
	"bytes"
	"errors"
	"io"
	"math"
	"sync"

	"github.com/gobwas/ws"
)

// The sizes of a Reader's two buffers. The small one is part of the Reader, is
// what an idle connection waits with, and holds most chat messages. The large
// one is pooled, taken when a frame does not fit the small one, and given back
// as soon as everything in it is used; 72 KiB hold a frame of 64 KiB whole.
const (
	smallBuffer = 458
	largeBuffer = 72 << 10

	// headroom lies free before the first byte read, so that the header of a
	// later fragment can be put right before its payload.
	headroom = ws.MaxHeaderSize
)

var largeBuffers = sync.Pool{New: func() any { return new([largeBuffer]byte) }}

// ErrTooBig says that a frame would make its message larger than SetLimit allows.
var ErrTooBig = errors.New("message too big")

// errBufferFull would be a bug: a Reader always hands out what fills its buffer.
var errBufferFull = errors.New("frame buffer is full of an unfinished frame")

// Unit is one complete frame as it is passed on: a frame of the peer, or a
// fragment of one. It is valid until the next call of Next, its slices until the
// next Fill.
type Unit struct {
	Op      ws.OpCode // ws.OpContinuation for what continues a message
	Wire    []byte    // header and payload, as they are to be written
	Payload []byte    // the payload inside Wire, masked if the peer masks
	Mask    [4]byte   // the key of Payload; zero if the peer does not mask

	// For data frames: whether this unit begins or ends a message.
	First, Last bool

	// For a close frame: what it says. Code is NoStatus for an empty one.
	Code   uint16
	Reason string
}

// Data reports whether u belongs to a message, and is no control frame.
func (u *Unit) Data() bool { return !u.Op.IsControl() }

// Unmasked returns a copy of the payload of a control frame, unmasked.
func (u *Unit) Unmasked() []byte {
	p := append([]byte(nil), u.Payload...)
	ws.Cipher(p, u.Mask, 0)
	return p
}

// Reader cuts the bytes of one peer into Units. It is used by one goroutine.
type Reader struct {
	masked     bool // the peer is a client and must mask (§5.1)
	compressed bool // permessage-deflate is agreed (RFC 7692 §6): RSV1 may open a message

	fragmented bool      // a message has begun and has not ended
	head       ws.Header // the frame last looked at, which may be in progress …
	rest       int64     // … and how much of its payload has not been handed out

	limit int64 // the most payload of a message that begins now …
	left  int64 // … and how much more the frames to come of the current one may have

	large *[largeBuffer]byte // nil while the small buffer is in use
	r, w  int                // what is buffered: buf()[r:w]

	unit    Unit         // what Next returned; kept here to keep stacks small
	from    bytes.Reader // for ws.ReadHeaderBuffer
	scratch [ws.MaxHeaderSize]byte
	small   [smallBuffer]byte
}

// Init makes r ready for a new peer. masked is set if the peer is a client,
// compressed if permessage-deflate is agreed with it.
func (r *Reader) Init(masked, compressed bool) {
	r.Release()
	*r = Reader{masked: masked, compressed: compressed, limit: math.MaxInt64, r: headroom, w: headroom}
}

// SetLimit bounds the payload of a message, in bytes on the wire over all its
// fragments: what is compressed counts as it is. Zero is no limit. A message of which
// a part was handed out keeps the limit it began with, so that a change ends none.
func (r *Reader) SetLimit(limit int64) {
	if limit == 0 {
		limit = math.MaxInt64
	}
	r.limit = limit
}

// Preload takes bytes that were read from the peer together with its handshake.
// It is called before the first Fill, with at most largeBuffer - headroom bytes.
func (r *Reader) Preload(early []byte) {
	if len(early) > smallBuffer-headroom {
		r.grow()
	}
	r.w += copy(r.buf()[r.w:], early)
}

// Fill reads from src once. All Units handed out before it are used up. When it
// returns an error there may be new bytes all the same, and it may be called
// again after a timeout.
func (r *Reader) Fill(src io.Reader) error {
	r.makeRoom()
	buf := r.buf()
	if r.w == len(buf) {
		return errBufferFull
	}
	n, err := src.Read(buf[r.w:])
	r.w += n
	if n > 0 && err == io.EOF {
		return nil // the next read says it again
	}
	return err
}

// Buffered returns how many bytes wait to be handed out.
func (r *Reader) Buffered() int { return r.w - r.r }

// MidMessage reports whether a message was handed out in part: its end is still
// to come.
func (r *Reader) MidMessage() bool { return r.fragmented }

// Release gives a pooled buffer back. Buffered bytes are lost.
func (r *Reader) Release() {
	if r.large != nil {
		largeBuffers.Put(r.large)
		r.large = nil
	}
	r.r, r.w = headroom, headroom
}

// Next returns the next unit, or nil if Fill has to be called first. An error is a
// ProtocolError or ErrTooBig, found by the header alone where that is enough;
// nothing of the offending frame was or will be handed out.
func (r *Reader) Next() (*Unit, error) {
	if r.rest > 0 {
		return r.nextFragment(), nil
	}
	size, err := r.peekHeader()
	if err != nil || size == 0 {
		return nil, err
	}
	if err := r.check(size); err != nil {
		return nil, err
	}
	payload := r.w - r.r - size
	if int64(payload) >= r.head.Length {
		return r.nextWhole(size)
	}
	if r.head.OpCode.IsControl() || payload < MinFragment {
		return nil, nil
	}
	return r.firstFragment(size), nil
}

// peekHeader decodes the header at the front of the buffer into head. The size
// it took there is 0 if not all of it has arrived.
func (r *Reader) peekHeader() (size int, err error) {
	b := r.buf()[r.r:r.w]
	if len(b) < 2 || len(b) < wireHeaderSize(b[1]) {
		return 0, nil
	}
	r.from.Reset(b)
	r.head, err = ws.ReadHeaderBuffer(&r.from, r.scratch[:])
	if err != nil {
		// All bytes are there, so the one thing that can be wrong is the length.
		return 0, errLengthTopBit
	}
	return wireHeaderSize(b[1]), nil
}

// check applies RFC 6455 §5.2 to §5.5 and the limit to the header of a frame.
func (r *Reader) check(size int) error {
	state := ws.StateExtended // reserved bits are judged below
	if r.masked {
		state = state.Set(ws.StateServerSide)
	} else {
		state = state.Set(ws.StateClientSide)
	}
	if r.fragmented {
		state = state.Set(ws.StateFragmented)
	}
	if err := ws.CheckHeader(r.head, state); err != nil {
		return err
	}
	if r.head.Rsv != 0 {
		// RFC 7692 §6.1: RSV1 on the first frame of a message, nothing else.
		opens := r.head.OpCode == ws.OpText || r.head.OpCode == ws.OpBinary
		if !r.compressed || !opens || r.head.Rsv != ws.Rsv(true, false, false) {
			return errRSV
		}
	}
	if size != ws.HeaderSize(r.head) {
		return errLengthNotMinimal
	}
	if !r.head.OpCode.IsControl() && r.head.Length > r.room() {
		return ErrTooBig
	}
	return nil
}

// room is how much payload the data frame last looked at may have.
func (r *Reader) room() int64 {
	if r.head.OpCode == ws.OpContinuation {
		return r.left
	}
	return r.limit
}

// nextWhole hands out a frame that has arrived completely.
func (r *Reader) nextWhole(size int) (*Unit, error) {
	end := r.r + size + int(r.head.Length)
	wire := r.buf()[r.r:end]
	u := &r.unit
	*u = Unit{Op: r.head.OpCode, Wire: wire, Payload: wire[size:], Mask: r.head.Mask}
	if u.Data() {
		u.First, u.Last = u.Op != ws.OpContinuation, r.head.Fin
		r.fragmented = !r.head.Fin
		r.left = r.room() - r.head.Length
	} else if u.Op == ws.OpClose {
		var err error
		if u.Code, u.Reason, err = parseClose(u.Unmasked()); err != nil {
			return nil, err
		}
	}
	r.r = end
	return u, nil
}

// firstFragment hands out what has arrived of a frame that is not complete.
func (r *Reader) firstFragment(size int) *Unit {
	r.rest = r.head.Length
	r.left = r.room() - r.head.Length
	r.r += size
	u := r.fragment(r.w-r.r, r.head.OpCode, r.head.Rsv)
	u.First = u.Op != ws.OpContinuation
	return u
}

// nextFragment hands out more of the frame in progress, if enough has arrived.
func (r *Reader) nextFragment() *Unit {
	n := r.w - r.r
	if int64(n) < r.rest && n < MinFragment {
		return nil
	}
	return r.fragment(n, ws.OpContinuation, 0)
}

// fragment hands out the next n bytes of the frame in progress, or what is left
// of it. But for the last one a fragment's length is a multiple of four, so that
// the masking key (§5.3) needs no rotation. The header is put right before the
// payload: there is either the frame's own header, which was no shorter, or
// what was handed out before the last Fill.
func (r *Reader) fragment(n int, op ws.OpCode, rsv byte) *Unit {
	last := int64(n) >= r.rest
	if last {
		n = int(r.rest)
	} else {
		n &^= 3
	}
	h := r.head
	h.Fin, h.Rsv, h.OpCode, h.Length = last && h.Fin, rsv, op, int64(n)
	head := putHeader(r.scratch[:], h)
	buf := r.buf()
	start, end := r.r-len(head), r.r+n
	copy(buf[start:], head)
	r.unit = Unit{Op: op, Wire: buf[start:end], Payload: buf[r.r:end], Mask: h.Mask, Last: h.Fin}
	r.rest -= int64(n)
	r.r = end
	r.fragmented = !h.Fin
	return &r.unit
}

// makeRoom prepares the buffer for a read: the small one whenever nothing is
// buffered and no large frame is under way, else one with room for more.
func (r *Reader) makeRoom() {
	buffered := r.w - r.r
	switch {
	case buffered == 0 && r.rest <= smallBuffer-headroom:
		r.Release()
	case r.large == nil && !r.fitsSmall():
		r.grow()
	case r.r > headroom:
		buf := r.buf()
		copy(buf[headroom:], buf[r.r:r.w])
		r.r, r.w = headroom, headroom+buffered
	}
}

// fitsSmall reports whether the small buffer holds what is to be handed out
// next: the rest of the frame under way, or the frame whose header has arrived.
func (r *Reader) fitsSmall() bool {
	const room = smallBuffer - headroom
	if r.rest > 0 {
		return r.rest <= room
	}
	size, _ := r.peekHeader()
	return size == 0 || r.head.Length <= int64(room-size) // a sum could overflow
}

// grow moves what is buffered to a large buffer.
func (r *Reader) grow() {
	large := largeBuffers.Get().(*[largeBuffer]byte)
	n := copy(large[headroom:], r.small[r.r:r.w])
	r.large = large
	r.r, r.w = headroom, headroom+n
}

func (r *Reader) buf() []byte {
	if r.large != nil {
		return r.large[:]
	}
	return r.small[:]
}

// wireHeaderSize is the size of a header by its second byte (§5.2).
func wireHeaderSize(second byte) int {
	size := 2
	switch second & 0x7f {
	case 126:
		size += 2
	case 127:
		size += 8
	}
	if second&0x80 != 0 {
		size += 4
	}
	return size
}
