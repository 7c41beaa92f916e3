// This file tests what a server may send after the handshake, when the connection
// has forgotten its config. As crypto/tls sends none of it, the test writes the
// server's records itself.

package transport

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"crypto/tls"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"

	"github.com/holdfast-proxy/caddy-holdfast/internal/testca"
)

func TestMessagesAfterTheHandshake(t *testing.T) {
	// RFC 8446 §4.6.1: new_session_ticket, an hour, no age_add, nonce, ticket, no extensions.
	ticket := []byte("\x04\x00\x00\x13" + "\x00\x00\x0e\x10" + "\x00\x00\x00\x00" + "\x01\x00" + "\x00\x05ABCDE" + "\x00\x00")
	// §4.6.3: key_update, without and with update_requested.
	update, exchange := []byte("\x18\x00\x00\x01\x00"), []byte("\x18\x00\x00\x01\x01")
	for name, messages := range map[string][][]byte{
		"session tickets":        {ticket, ticket},
		"new keys of the server": {update},
		"new keys of both":       {exchange},
		"several of all":         {ticket, exchange, ticket, update, exchange},
	} {
		t.Run(name, func(t *testing.T) {
			ca := testca.New(t)
			config := &tls.Config{Certificates: []tls.Certificate{ca.Issue(t, "backend", "127.0.0.1")}, MinVersion: tls.VersionTLS13}
			served := make(chan error, 1)
			address := upstream(t, "tcp", "127.0.0.1:0", func(conn net.Conn) { served <- sendMessages(conn, config, messages) })
			d := newDialer(t, "tls_trust_pool file "+ca.File("ca.crt"), "")
			conn, err := d.Dial(testContext(t), Request{Network: "tcp", Address: address, TLS: true})
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			got := make([]byte, len("question"))
			if _, err := io.ReadFull(conn, got); err != nil || string(got) != "question" {
				t.Fatalf("got %q, error %v, want %q", got, err, "question")
			}
			if _, err := io.WriteString(conn, "answer"); err != nil {
				t.Fatal(err)
			}
			if err := <-served; err != nil {
				t.Error(err)
			}
		})
	}
}

// sendMessages is a server that sends handshake messages and a question, and wants
// an answer, which comes by the keys that were agreed last.
func sendMessages(conn net.Conn, config *tls.Config, messages [][]byte) error {
	var keyLog bytes.Buffer
	config.KeyLogWriter = &keyLog
	server := tls.Server(conn, config)
	if err := server.Handshake(); err != nil {
		return err
	}
	// What hardware with AES agrees on, and all that recordWriter can do.
	if suite := server.ConnectionState().CipherSuite; suite != tls.TLS_AES_128_GCM_SHA256 {
		return fmt.Errorf("got suite %s, want %s", tls.CipherSuiteName(suite), tls.CipherSuiteName(tls.TLS_AES_128_GCM_SHA256))
	}
	secret, err := serverSecret(keyLog.String())
	if err != nil {
		return err
	}
	const handshake, data, keyUpdate = 22, 23, 24 // RFC 8446 §5.1, §4
	w := &recordWriter{w: conn, secret: secret}
	for _, m := range messages {
		if err := w.write(handshake, m); err != nil {
			return err
		}
		if m[0] == keyUpdate { // §7.2
			w.secret, w.sequence = expand(w.secret, "traffic upd", sha256.Size), 0
		}
	}
	if err := w.write(data, []byte("question")); err != nil {
		return err
	}
	got := make([]byte, len("answer"))
	if _, err := io.ReadFull(server, got); err != nil || string(got) != "answer" {
		return fmt.Errorf("got %q, error %v, want %q", got, err, "answer")
	}
	return nil
}

// serverSecret returns the first secret of what a server writes, from a key log.
func serverSecret(log string) ([]byte, error) {
	for line := range strings.Lines(log) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "SERVER_TRAFFIC_SECRET_0" {
			return hex.DecodeString(f[2])
		}
	}
	return nil, errors.New("the key log has no secret")
}

// recordWriter writes records of TLS 1.3 by AES-128-GCM, RFC 8446 §5.2.
type recordWriter struct {
	w        io.Writer
	secret   []byte
	sequence byte
}

func (r *recordWriter) write(contentType byte, content []byte) error {
	block, err := aes.NewCipher(expand(r.secret, "key", 16))
	if err != nil {
		return err
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return err
	}
	nonce := expand(r.secret, "iv", aead.NonceSize())
	nonce[len(nonce)-1] ^= r.sequence
	r.sequence++
	inner := append(bytes.Clone(content), contentType)
	header := binary.BigEndian.AppendUint16([]byte{23, 3, 3}, uint16(len(inner)+aead.Overhead()))
	_, err = r.w.Write(aead.Seal(header, nonce, inner, header))
	return err
}

// expand is HKDF-Expand-Label with an empty context, RFC 8446 §7.1.
func expand(secret []byte, label string, length int) []byte {
	label = "tls13 " + label
	info := append(binary.BigEndian.AppendUint16(nil, uint16(length)), byte(len(label)))
	info = append(append(info, label...), 0)
	key, err := hkdf.Expand(sha256.New, secret, string(info), length)
	if err != nil {
		panic(err) // the length is a constant
	}
	return key
}
