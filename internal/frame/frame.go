// Package frame cuts a peer's byte stream into WebSocket frames (RFC 6455 §5),
// checks every header before a byte of the frame is passed on, and hands the
// frames out as they stood on the wire: nothing is unmasked, inflated or
// reassembled.
//
// Invariants:
//   - A Unit is always a complete frame. A frame of which only a part has
//     arrived is handed out as fragments (§5.4), so between two Units a control
//     frame may be written at any time and a lost peer never leaves a torn frame.
//   - Such fragments are at least MinFragment bytes but for a frame's last one,
//     because receivers bound their number (ws: 16384 a message).
//   - Control frames are never split.
//   - Between messages, with nothing buffered, a Reader holds no pooled buffer.
package frame

import (
	"encoding/binary"
	"math/rand/v2"
	"unicode/utf8"

	"github.com/gobwas/ws"
)

// MinFragment is the smallest payload, in bytes, of a fragment that a Reader
// makes of an incomplete frame, but for the frame's last one.
const MinFragment = 16 << 10

// MaxControlPayload is the longest payload of a control frame (RFC 6455 §5.5).
const MaxControlPayload = ws.MaxControlFramePayloadSize

// NoStatus stands for a close frame without a code (RFC 6455 §7.4.1). It is
// never on the wire.
const NoStatus = 1005

// ProtocolError says how a peer broke RFC 6455.
type ProtocolError = ws.ProtocolError

const (
	errLengthTopBit     = ProtocolError("the top bit of a 64-bit length must be 0")
	errLengthNotMinimal = ProtocolError("the length of a frame must be encoded in as few bytes as possible")
	errRSV              = ProtocolError("a reserved bit is set that no extension gave a meaning")
	errCloseLength      = ProtocolError("the payload of a close frame is one byte long")
	errCloseCode        = ProtocolError("the code of a close frame must not be on the wire")
	errCloseReason      = ProtocolError("the reason of a close frame is not UTF-8")
)

// Append appends a complete frame to dst and returns the result. With masked
// set, as a client must (RFC 6455 §5.3), the payload is masked with a key that
// nobody can predict; payload itself is not changed. The runtime's ChaCha8 does
// for that, on a tenth of the stack of crypto/rand, which would make every
// connection keep a larger one.
func Append(dst []byte, op ws.OpCode, payload []byte, masked bool) []byte {
	h := ws.Header{Fin: true, OpCode: op, Masked: masked, Length: int64(len(payload))}
	if masked {
		binary.LittleEndian.PutUint32(h.Mask[:], rand.Uint32()) //nolint:gosec // see above
	}
	var head [ws.MaxHeaderSize]byte
	dst = append(dst, putHeader(head[:], h)...)
	dst = append(dst, payload...)
	if masked {
		ws.Cipher(dst[len(dst)-len(payload):], h.Mask, 0)
	}
	return dst
}

// AppendClose appends a close frame with code and reason to dst. NoStatus makes
// an empty one. A reason that would not fit is cut at a rune (§5.5: a control
// frame's payload is at most 125 bytes, two of them the code).
func AppendClose(dst []byte, code uint16, reason string, masked bool) []byte {
	if code == NoStatus {
		return Append(dst, ws.OpClose, nil, masked)
	}
	reason = cutReason(reason)
	payload := make([]byte, 0, MaxControlPayload)
	payload = binary.BigEndian.AppendUint16(payload, code)
	return Append(dst, ws.OpClose, append(payload, reason...), masked)
}

// ValidCloseCode reports whether code may stand in a close frame: RFC 6455
// §7.4 and the IANA registry (1012 to 1014), or an application's own.
func ValidCloseCode(code uint16) bool {
	switch {
	case code < 1000, code > 4999:
		return false
	case code >= 3000:
		return true
	default:
		return code <= 1014 && code != 1004 && code != 1005 && code != 1006
	}
}

// parseClose checks an unmasked close payload and returns its parts.
func parseClose(payload []byte) (code uint16, reason string, err error) {
	switch len(payload) {
	case 0:
		return NoStatus, "", nil
	case 1:
		return 0, "", errCloseLength
	}
	code = binary.BigEndian.Uint16(payload)
	if !ValidCloseCode(code) {
		return 0, "", errCloseCode
	}
	if !utf8.Valid(payload[2:]) {
		return 0, "", errCloseReason
	}
	return code, string(payload[2:]), nil
}

func cutReason(reason string) string {
	const longest = MaxControlPayload - 2
	if len(reason) <= longest {
		return reason
	}
	cut := longest
	for cut > 0 && !utf8.RuneStart(reason[cut]) {
		cut--
	}
	return reason[:cut]
}

// putHeader writes h to buf, which holds at least ws.MaxHeaderSize bytes, and
// returns the bytes written.
func putHeader(buf []byte, h ws.Header) []byte {
	var out sliceWriter
	// Neither error can happen: the length is not negative, the buffer is long enough.
	_ = ws.WriteHeaderBuffer(&out, h, buf)
	return out.p
}

// sliceWriter keeps what is written to it in one call, without a copy.
type sliceWriter struct{ p []byte }

func (w *sliceWriter) Write(p []byte) (int, error) {
	w.p = p
	return len(p), nil
}
