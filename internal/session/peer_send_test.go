// This file is what a peer says: its writer, the frames it makes, and the ways in which
// it leaves.

package session

import (
	"bytes"
	"encoding/binary"
	"slices"
	"time"

	"github.com/gobwas/ws"
)

// write writes what is queued.
func (p *peer) write() {
	for {
		p.mu.Lock()
		for len(p.queue) == 0 && !p.over {
			p.changed.Wait()
		}
		if p.over {
			p.mu.Unlock()
			return
		}
		next := p.queue[0]
		p.queue = p.queue[1:]
		p.mu.Unlock()
		if next() != nil {
			return
		}
	}
}

// enqueue leaves bytes with the writer. p.mu is held.
func (p *peer) enqueue(wire []byte) {
	p.sent = append(p.sent, wire...)
	p.queue = append(p.queue, func() error {
		_, err := p.conn.Write(wire)
		return err
	})
	p.changed.Broadcast()
}

// sendInPieces writes bytes in pieces, with a pause after each.
func (p *peer) sendInPieces(wire []byte, size int, pause time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sent = append(p.sent, wire...)
	p.queue = append(p.queue, func() error {
		for piece := range slices.Chunk(wire, size) {
			if _, err := p.conn.Write(piece); err != nil {
				return err
			}
			p.nap(pause)
		}
		return nil
	})
	p.changed.Broadcast()
}

// sendEarly returns the frames that go with the handshake, and writes the others.
func (p *peer) sendEarly(early, later [][]byte) []byte {
	p.mu.Lock()
	p.sent = bytes.Join(early, nil)
	p.mu.Unlock()
	p.send(later...)
	return bytes.Join(early, nil)
}

// send writes bytes, after what was sent before.
func (p *peer) send(wires ...[]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, wire := range wires {
		p.enqueue(wire)
	}
}

// sendClose sends a close frame; the answer to it is not echoed.
func (p *peer) sendClose(code uint16, text string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.sentClose = true
	p.enqueue(p.closeFrame(code, text))
}

func (p *peer) closeFrame(code uint16, text string) []byte {
	var payload []byte
	if code != 1005 {
		payload = append(binary.BigEndian.AppendUint16(nil, code), text...)
	}
	return p.frame(true, 0, ws.OpClose, payload)
}

// sendFIN ends the peer's own direction, after what was sent before.
func (p *peer) sendFIN() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.queue = append(p.queue, p.conn.CloseWrite)
	p.changed.Broadcast()
}

// frame encodes a frame as this peer has to send it.
func (p *peer) frame(fin bool, rsv byte, op ws.OpCode, payload []byte) []byte {
	f := ws.NewFrame(op, fin, payload)
	f.Header.Rsv = rsv
	if p.masked {
		f = ws.MaskFrameWith(f, ws.NewMask())
	}
	return ws.MustCompileFrame(f)
}

func (p *peer) text(payload string) []byte { return p.frame(true, 0, ws.OpText, []byte(payload)) }

func (p *peer) binary(size int) []byte {
	payload := make([]byte, size)
	for i := range payload {
		payload[i] = byte(i ^ i>>8)
	}
	return p.frame(true, 0, ws.OpBinary, payload)
}

// exit closes the connection as the end of a process does.
func (p *peer) exit() { _ = p.conn.Close() }

// crash breaks the connection: what was on its way is lost.
func (p *peer) crash() { p.conn.Reset() }

// deaths are the ways of a backend to break a connection.
var deaths = map[string]func(p *peer){"exits": (*peer).exit, "crashes": (*peer).crash}
