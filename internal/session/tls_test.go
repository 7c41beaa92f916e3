// This file tests legs with TLS, which reads ahead of who reads it.

package session

import (
	"crypto/tls"
	"fmt"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/holdfast-proxy/caddy-holdfast/internal/registry"
	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

// netConn is a memConn as crypto/tls wants it.
type netConn struct{ *memConn }

func (netConn) LocalAddr() net.Addr  { return nil }
func (netConn) RemoteAddr() net.Addr { return nil }

func (c netConn) SetDeadline(t time.Time) error {
	_ = c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

// Its end has arrived, and all before it; a slow client gets all of it.
func TestABackendThatHasLeftIsNotGoneWhileTLSHoldsItsWords(t *testing.T) {
	cert := testca.New(t).Issue(t, "backend", "localhost")
	synctest.Test(t, func(t *testing.T) {
		r := start(t, setup{secure: true, buffer: 4000, client: manners{stalled: true}, backend: manners{stalled: true}})
		far := tls.Server(netConn{r.backend.conn}, &tls.Config{
			Certificates: []tls.Certificate{cert}, DynamicRecordSizingDisabled: true, // all in one record
		})
		if err := far.Handshake(); err != nil {
			t.Fatal(err)
		}
		var record []byte
		messages := make([]string, 30)
		for i := range messages {
			messages[i] = fmt.Sprintf("%0440d", i) // with its header all that an idle leg reads at once
			record = append(record, r.backend.text(messages[i])...)
		}
		if _, err := far.Write(append(record, r.backend.closeFrame(1000, "bye")...)); err != nil {
			t.Fatal(err)
		}
		r.backend.sendFIN() // below TLS
		r.pass(5 * time.Second)
		if info, _ := r.legs[backendSide].SockInfo(); !info.Finished || info.Unread > 0 {
			t.Fatalf("got %+v of the backend's socket, want nothing left there", info)
		}
		r.client.resume()
		r.wait(10 * time.Second)
		if got, _ := r.client.messages(); !slices.Equal(got, messages) || r.client.farewell(t) != "1000 bye" {
			t.Errorf("got %d messages and close %q (%s), want %d and the backend's",
				len(got), r.client.farewell(t), r.rec.Ending().Reason, len(messages))
		}
		if got := r.rec.Ending().Reason; got != registry.BackendClosed {
			t.Errorf("got reason %q, want the backend's close", got)
		}
	})
}
